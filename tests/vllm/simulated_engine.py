"""A vLLM engine of any supported version in one process: its real scheduler, its real worker-side call order, its real
connector factory. Only the model is made up: the KV of a token is a number that depends on every token before it.

Every position that a step would attend to is compared with that number first, and so is every block before it is
offloaded. Wrong, stale or missing KV is an AssertionError at the step that would have used it.
"""

from __future__ import annotations

import pickle
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import CUDAGraphMode
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention.kv_transfer_utils import maybe_transfer_kv_layer
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from dynamo_connectors.vllm.connector import DynamoConnector
from dynamo_connectors.vllm.messages import StepPlan

BLOCK = 32
LAYERS = ("model.layers.0.attn", "model.layers.1.attn")
SPEC = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
VOCABULARY = 500
#: Far more than anything here takes; an idle step waits up to a millisecond for a copy.
MAX_STEPS = 20_000


def ours(connector: Any) -> Any:
    """The dynamo connector, also where vLLM holds it as the child of a `MultiConnector`."""
    (dynamo,) = (
        child for child in getattr(connector, "_connectors", (connector,)) if isinstance(child, DynamoConnector)
    )
    return dynamo


def plan_of(metadata: Any) -> StepPlan:
    """What our scheduler half plans, also among the metadata of a `MultiConnector`'s other children."""
    (plan,) = (child for child in getattr(metadata, "metadata", (metadata,)) if isinstance(child, StepPlan))
    return plan


@dataclass
class Truth:
    """All tokens of one request, its answer included, and the KV of each. Exact in float32."""

    tokens: list[int]
    numbers: list[float]
    prompt_length: int

    @classmethod
    def of(cls, prompt: Sequence[int], answer_tokens: int) -> Truth:
        tokens, numbers, state = list(prompt), [], 1
        # Steps that run ahead of the scheduler compute a little beyond the answer.
        for position in range(len(prompt) + answer_tokens + 4):
            if position == len(tokens):
                tokens.append(state % VOCABULARY)
            state = (state * 31 + tokens[position] + 7) % 65521
            numbers.append(float(state))
        return cls(tokens, numbers, len(prompt))


@dataclass
class Step:
    """What the workers get: the scheduler's output, and the block tables as they were then."""

    output: Any
    tables: dict[str, list[int]]
    computed: dict[str, int]
    samples: set[str]

    @property
    def graphs(self) -> CUDAGraphMode:
        """How it is computed: decode as one graph, which asks for no layer; the rest in pieces, or without graphs."""
        if max(self.output.num_scheduled_tokens.values()) == 1:
            return CUDAGraphMode.FULL
        return CUDAGraphMode.NONE if self.output.total_num_scheduled_tokens > BLOCK else CUDAGraphMode.PIECEWISE


@dataclass(frozen=True)
class Mode:
    name: str
    async_scheduling: bool = False
    v2_runner: bool = False
    workers: int = 1
    #: The last layer belongs to a draft model, which runs after everything has been asked what ended.
    draft_layer: bool = False
    #: Loads that run ahead arrive layer by layer, as on a GPU (`late_layers`).
    by_layers: bool = False


class SimulatedWorker:
    """One rank: its KV tensors, its connector, and the version's own order of calls around a forward."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, mode: Mode) -> None:
        self._vllm_config = vllm_config
        self._mode = mode
        self.kv = self.allocate((kv_cache_config.num_blocks, 1, BLOCK, 16))
        layers = {layer: SimpleNamespace(kv_cache=tensor) for layer, tensor in self.kv.items()}
        vllm_config.compilation_config.static_forward_context = layers
        #: What the KV of this rank's heads has beside the number of its token and layer.
        self.of_heads = torch.zeros(1)
        #: Called with each block and layer that is about to be written.
        self.before_write: Callable[[int, str], None] = lambda block, layer: None
        self.connector = KVConnectorFactory.create_connector(vllm_config, KVConnectorRole.WORKER, kv_cache_config)
        with self._as_current_rank():
            if mode.v2_runner:
                self._hooks = ActiveKVConnector(vllm_config, self.kv)
            else:
                self.connector.register_kv_caches(self.kv)

    def allocate(self, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return {layer: torch.full(shape, -1.0) for layer in LAYERS}

    def execute(self, step: Step, truths: dict[str, Truth]) -> Any:
        """Returns the step's `KVConnectorOutput`, as it arrives in the scheduler's process."""
        # The metadata is pickled on its way to a worker, and so is what comes back.
        step.output.kv_connector_metadata = pickle.loads(pickle.dumps(step.output.kv_connector_metadata))
        with self._as_current_rank():
            output = self._execute_v2(step, truths) if self._mode.v2_runner else self._execute_v1(step, truths)
        return pickle.loads(pickle.dumps(output))

    def _execute_v1(self, step: Step, truths: dict[str, Truth]) -> Any:
        self.connector.handle_preemptions(step.output.kv_connector_metadata)
        if not step.output.total_num_scheduled_tokens:
            no_forward = KVConnectorModelRunnerMixin.kv_connector_no_forward
            return no_forward(step.output, self._vllm_config).kv_connector_output
        with (
            self._forward_context(step),
            KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(
                step.output, defer_finalize=self._mode.draft_layer
            ) as output,
        ):
            if self._mode.draft_layer:
                self._forward(step, truths, LAYERS[:1])
            else:
                self._forward(step, truths)
        if self._mode.draft_layer:
            with self._forward_context(step):
                self._forward(step, truths, LAYERS[1:])
            KVConnectorModelRunnerMixin.finalize_kv_connector()
        return output

    def _forward_context(self, step: Step) -> AbstractContextManager[None]:
        metadata = {layer: object() for layer in LAYERS}
        return set_forward_context(metadata, self._vllm_config, cudagraph_runtime_mode=step.graphs)

    def _execute_v2(self, step: Step, truths: dict[str, Truth]) -> Any:
        if not step.output.total_num_scheduled_tokens:
            return self._hooks.no_forward(step.output).kv_connector_output
        if step.graphs == CUDAGraphMode.FULL:
            self._hooks.pre_forward(step.output)
            self._forward(step, truths)
        else:
            with self._forward_context(step):
                self._hooks.pre_forward(step.output)
                self._forward(step, truths)
        finished = step.output.finished_req_ids
        if not hasattr(self._hooks, "finalize_step"):
            return self._hooks.post_forward(finished)
        # 0.33 ends the step after it has collected what ended.
        output = self._hooks.post_forward(finished, defer_finalize=True)
        self._hooks.finalize_step()
        return output

    def _forward(self, step: Step, truths: dict[str, Truth], layers: Sequence[str] = LAYERS) -> None:
        """Layer by layer in vLLM's order: the new tokens' KV is written, the connector is asked, all KV is read."""

        def attend(layer_name: str) -> None:
            for request_id in step.output.num_scheduled_tokens:
                start = step.computed[request_id]
                past, what = truths[request_id].numbers[:start], f"{request_id} before position {start}"
                self.assert_kv(step.tables[request_id], past, what, [layer_name])

        asked = attend if step.graphs == CUDAGraphMode.FULL else maybe_transfer_kv_layer(attend)
        for layer in layers:
            for request_id, scheduled in step.output.num_scheduled_tokens.items():
                truth, table, start = truths[request_id], step.tables[request_id], step.computed[request_id]
                for position in range(start, start + scheduled):
                    block = table[position // BLOCK]
                    self.before_write(block, layer)
                    number = truth.numbers[position] + LAYERS.index(layer)
                    self.kv[layer][block, :, position % BLOCK] = number + self.of_heads
            asked(layer)

    def assert_kv(
        self, table: Sequence[int], numbers: Sequence[float], what: str, layers: Sequence[str] = LAYERS
    ) -> None:
        wanted = torch.tensor(numbers)
        for layer in layers:
            rows = self.kv[layer][list(table)].permute(0, 2, 1, 3).flatten(0, 1)[: len(numbers)]
            right = wanted[:, None, None] + LAYERS.index(layer) + self.of_heads
            wrong = (rows != right).flatten(1).any(dim=1).nonzero().flatten().tolist()
            assert not wrong, f"{what}: wrong KV in {layer} at positions {wrong[:5]}"

    def before_offloads(self, check: Callable[[Any], None]) -> None:
        """Calls `check` with each item to store at the moment from which its block may be read."""
        half = ours(self.connector)._worker
        start = half.start_offloads

        def checked(plan: Any) -> None:
            for item in (item for store in plan.stores for item in store.items):
                check(item)
            start(plan)

        half.start_offloads = checked

    @contextmanager
    def _as_current_rank(self) -> Iterator[None]:
        kv_transfer_state._KV_CONNECTOR_AGENT = self.connector
        try:
            yield
        finally:
            kv_transfer_state._KV_CONNECTOR_AGENT = None


class SimulatedEngine:
    worker_class = SimulatedWorker
    groups = (KVCacheGroupSpec(list(LAYERS), SPEC),)

    def __init__(self, vllm_config: Any, mode: Mode, num_blocks: int) -> None:
        vllm_config.scheduler_config.async_scheduling = mode.async_scheduling
        vllm_config.parallel_config.world_size = mode.workers
        vllm_config.parallel_config.tensor_parallel_size = mode.workers
        vllm_config.cache_config.num_gpu_blocks = num_blocks
        kv_cache_config = KVCacheConfig(num_blocks, [], list(self.groups))
        init_none_hash(sha256)
        self._block_hasher = get_request_block_hasher(BLOCK, sha256)
        self._block_numbers: dict[bytes, list[float]] = {}
        self.workers = [self.worker_class(vllm_config, kv_cache_config, mode) for _ in range(mode.workers)]
        for worker in self.workers:
            worker.before_offloads(partial(self.assert_stored, worker))
        self._aggregator = KVOutputAggregator.from_connector(self.workers[0].connector, mode.workers)
        scheduler_class = AsyncScheduler if mode.async_scheduling else Scheduler
        structured = StructuredOutputManager(vllm_config)
        self.scheduler = scheduler_class(vllm_config, kv_cache_config, structured, block_size=BLOCK, log_stats=True)
        self.scheduler.use_v2_model_runner = mode.v2_runner
        self.events: list[Any] = []
        self.scheduler.kv_event_publisher.publish = lambda batch: self.events.extend(batch.events)
        self.stats: list[dict[str, Any]] = []
        self._depth = 2 if mode.async_scheduling else 1
        self._in_flight: deque[Step] = deque()
        self._truths: dict[str, Truth] = {}
        self.answers: dict[str, list[int]] = {}
        #: What the plans asked for so far.
        self.planned: Counter[str] = Counter()
        self.preemptions = 0

    @property
    def block_pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    def table_of(self, request_id: str) -> Any:
        return list(self.scheduler.kv_cache_manager.get_block_ids(request_id)[0])

    def assert_stored(self, worker: SimulatedWorker, item: Any) -> None:
        worker.assert_kv([item.block], self._block_numbers[item.key], f"block {item.block} to offload")

    def submit(self, request_id: str, prompt: Sequence[int], answer_tokens: int) -> Request:
        sampling = SamplingParams(max_tokens=answer_tokens, ignore_eos=True)
        request = Request(request_id, list(prompt), sampling, None, block_hasher=self._block_hasher)
        self._truths[request_id] = Truth.of(prompt, answer_tokens)
        self.answers[request_id] = []
        self.scheduler.add_request(request)
        return request

    def abort(self, *request_ids: str) -> None:
        self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)

    def schedule(self) -> None:
        output = self.scheduler.schedule()
        requests = self.scheduler.requests
        self.preemptions += len(output.preempted_req_ids or ())
        scheduled = output.num_scheduled_tokens
        step = Step(
            output,
            {name: self.table_of(name) for name in scheduled},
            {name: requests[name].num_computed_tokens - tokens for name, tokens in scheduled.items()},
            {name for name in scheduled if not requests[name].is_prefill_chunk},
        )
        for request in requests.values():
            numbers = self._truths[request.request_id].numbers
            for index, key in enumerate(request.block_hashes):
                self._block_numbers[key] = numbers[index * BLOCK : (index + 1) * BLOCK]
        self._in_flight.append(step)

    def finish_step(self) -> None:
        """Runs the oldest scheduled step on every worker, and tells the scheduler."""
        step = self._in_flight.popleft()
        plan = plan_of(step.output.kv_connector_metadata)
        self.planned.update(loads=sum(len(load.items) for load in plan.loads))
        self.planned.update(stores=sum(len(store.items) for store in plan.stores))
        outputs = []
        for worker in self.workers:
            outputs.append(self._model_output(step, worker.execute(step, self._truths)))
        combined = self._aggregator.aggregate(outputs) if len(outputs) > 1 else outputs[0]
        for client_outputs in self.scheduler.update_from_output(step.output, combined).values():
            for output in client_outputs.outputs:
                self.answers[output.request_id].extend(output.new_token_ids)
            if client_outputs.scheduler_stats and client_outputs.scheduler_stats.kv_connector_stats:
                self.stats.append(client_outputs.scheduler_stats.kv_connector_stats)

    def step(self) -> None:
        if self.scheduler.has_requests():
            self.schedule()
        if self._in_flight and (len(self._in_flight) >= self._depth or not self.scheduler.has_requests()):
            self.finish_step()

    def run(self) -> None:
        """Until nothing is left to do, offloads included."""
        self.step_until(lambda: not self.scheduler.has_requests() and not self._in_flight)

    def step_until(self, condition: Callable[[], bool]) -> None:
        for _ in range(MAX_STEPS):
            if condition():
                return
            self.step()
        raise AssertionError(f"not even after {MAX_STEPS} steps")

    def expect_answer(self, request_id: str) -> None:
        truth, answer = self._truths[request_id], self.answers[request_id]
        wanted = truth.tokens[truth.prompt_length : truth.prompt_length + len(answer)]
        assert answer == wanted, f"{request_id}: {answer} instead of {wanted}"

    def close(self) -> None:
        self.scheduler.shutdown()
        for worker in self.workers:
            worker.connector.shutdown()

    def _model_output(self, step: Step, kv_connector_output: Any) -> ModelRunnerOutput:
        names = list(step.output.num_scheduled_tokens)
        sampled = []
        for name in names:
            end = step.computed[name] + step.output.num_scheduled_tokens[name]
            sampled.append([self._truths[name].tokens[end]] if name in step.samples else [])
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
            kv_connector_output=kv_connector_output,
        )
