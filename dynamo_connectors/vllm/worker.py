"""The worker half: owns this worker's bytes, starts the jobs it is told to, and reports how they ended."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Mapping

from dynamo_kernels.block_view import BlockView
from dynamo_kernels.fence import ComputeFence

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.config import HOST_DRAM
from dynamo_connectors.errors import DynamoConnectorsError
from dynamo_connectors.jobs import EraseJob, JobReport, LoadJob, MoveJob, StoreJob
from dynamo_connectors.transfer import Stores, TransferEngine
from dynamo_connectors.vllm.compat import engine_logger
from dynamo_connectors.vllm.lasting import LastingTiers
from dynamo_connectors.vllm.layer_hooks import LayerHooks
from dynamo_connectors.vllm.messages import StepPlan, WorkerReports
from dynamo_connectors.vllm.peers import WorkerPeers

log = engine_logger(__name__)

#: How long an idle step may wait for a job to end, instead of spinning through empty steps; and for one that a request
#: waits for, whose threads want the interpreter that the engine's thread would spin in.
_IDLE_WAIT_SECONDS, _LOAD_WAIT_SECONDS = 0.001, 0.004


class WorkerHalf:
    """One per worker. Called by vLLM's model runner only; the copies run on the transfer engine's threads.

    With several KV cache groups a block id alone does not say whose block failed, so vLLM wants the request instead.
    """

    def __init__(
        self,
        hbm: BlockView,
        stores: Stores,
        lasting: LastingTiers,
        num_groups: int = 1,
        peers: WorkerPeers | None = None,
        part_of_layer: Mapping[str, int] | None = None,
    ) -> None:
        self._device = hbm.device
        self._lasting = lasting
        self._num_groups = num_groups
        self._peers = peers
        self._transfers = TransferEngine(hbm, stores)
        self._layers = LayerHooks(part_of_layer or {})
        if part_of_layer:
            self._transfers.prepare_layers()
        self._loads: dict[int, LoadJob] = {}
        #: Behind what was computed before this step, if it loads.
        self._begun: ComputeFence | None = None
        #: Loads whose requests may be computed on already; the rows that they read are still theirs.
        self._ahead: set[int] = set()
        #: job -> what it does, for the metrics.
        self._running: dict[int, str] = {}
        self._reports: list[JobReport] = []
        self._loaded_requests: set[str] = set()
        self._failed_requests: set[str] = set()
        self._bad_blocks: set[int] = set()
        #: (what, tier) -> bytes and seconds of each transfer since the last `take_transfers`.
        self._transferred: defaultdict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)

    def begin(self, plan: StepPlan, kind: str | None = None) -> None:
        """Called before anything of the step is computed: its loads need not wait for more than what came before.

        `kind`: of the step, if its layers are expected to ask before they read (`compat.kind_of_step`).
        """
        self._begun = ComputeFence(self._device) if plan.loads else None
        if not plan.is_idle and not self._layers.begin(kind, self._transfers.layers.is_open):
            self._transfers.layers.join()

    def wait_for_layer(self, layer: str) -> None:
        """Called before each layer of this step reads KV. May be asked for the same one again."""
        if not self._layers.listens:
            return
        part = self._layers.ask(layer)
        if part is None:
            self._transfers.layers.join()
        else:
            self._transfers.layers.wait(part)

    def end_step(self) -> None:
        """Called after all that the step computes was enqueued: what comes now knows nothing of layers."""
        self._transfers.layers.join()
        before = self._layers.may_come
        # vLLM ends a step that raised in the same way, and its own error is the one to hear.
        self._layers.end(is_broken=sys.exc_info()[0] is not None)
        if self._layers.may_come and not before:
            log.info("dynamo: loads from host memory may arrive layer by layer, from now on")

    def start_loads(self, plan: StepPlan) -> None:
        if self._peers is not None:
            self._peers.start(plan)
        if plan.forget:
            self._lasting.forget()
        for load in plan.loads:
            self._start_load(plan, load, self._begun or ComputeFence(self._device))

    def start_offloads(self, plan: StepPlan) -> None:
        """Called after the step's compute was enqueued, which may still be filling the blocks to store."""
        if plan.stores:
            self._transfers.layers.join()
        for store in plan.stores:
            self._start(store, "offload")
        for move in plan.moves:
            self._start(move, "prefetch" if move.target_tier == HOST_DRAM else "offload")
        for erasure in plan.erasures:
            self._start(erasure, "erase")
        if plan.is_idle and self._running:
            self._collect(_LOAD_WAIT_SECONDS if self._loads else _IDLE_WAIT_SECONDS)

    def take_loaded_requests(self) -> set[str]:
        """Requests whose load ended, well or badly, since the last call, or will have before they are computed."""
        self._transfers.join()
        self._collect(0.0)
        loaded, self._loaded_requests = self._loaded_requests, set()
        return loaded

    def take_bad_blocks(self) -> set[int]:
        """HBM blocks that a load did not fill. Never later than the request they belong to."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_failed_requests(self) -> set[str]:
        """Requests whose load failed, where blocks cannot tell. Never later than `take_loaded_requests` names them."""
        failed, self._failed_requests = self._failed_requests, set()
        return failed

    def take_reports(self) -> WorkerReports | None:
        reports, self._reports = self._reports, []
        if self._peers is not None:
            reports += self._peers.take_reports()
        finds, rates = self._lasting.take_finds(), self._lasting.take_rates()
        return WorkerReports.of(reports, finds, rates) if reports or finds or rates else None

    def take_transfers(self) -> Mapping[tuple[str, str], list[tuple[int, float]]]:
        transferred, self._transferred = self._transferred, defaultdict(list)
        return transferred

    def take_failures(self) -> Mapping[tuple[str, str], int]:
        failures = Counter(self._lasting.take_failures())
        return failures + self._peers.take_counts() if self._peers is not None else failures

    def levels(self) -> Mapping[str, int]:
        """What stands at a level now, by metric."""
        return self._peers.levels() if self._peers is not None else {}

    def close(self) -> None:
        # First, so that nobody reads host memory that is given back.
        if self._peers is not None:
            self._peers.close()
        self._transfers.close()

    def check(self) -> None:
        assert self._loads.keys() | self._ahead <= self._running.keys(), "a load is known that is not running"
        assert self._num_groups > 1 or not self._failed_requests, "a request failed where a block would do"
        self._layers.check()

    def _start_load(self, plan: StepPlan, load: LoadJob, begun: ComputeFence) -> None:
        """Its request waits for it; or the engine's stream does, before this step's end."""
        self._running[load.job_id] = "onboard"
        may_run_ahead = load.may_run_ahead and (plan.is_idle or plan.hides_loads)
        # In a step that computes, what hides the load is that step; then the next one finds it there.
        by_layers = plan.is_idle and load.by_layers and self._layers.may_come
        beside = begun if by_layers or not plan.is_idle else None
        if may_run_ahead and self._transfers.run_ahead(load, beside=beside, by_layers=by_layers):
            self._ahead.add(load.job_id)
            self._loaded_requests.add(load.request_id)
        else:
            self._loads[load.job_id] = load
            self._transfers.submit(load, begun)

    def _start(self, job: StoreJob | MoveJob | EraseJob, what: str) -> None:
        self._running[job.job_id] = what
        self._transfers.submit(job, ComputeFence(self._device))

    def _collect(self, wait_seconds: float) -> None:
        for report in self._transfers.poll(wait_seconds):
            what = self._running.pop(report.job_id)
            for moved in report.moved:
                self._transferred[what, moved.tier].append((moved.num_bytes, moved.seconds))
            self._reports.append(report)
            if report.job_id in self._ahead:
                self._ahead.remove(report.job_id)
                self._end_ahead(report)
            load = self._loads.pop(report.job_id, None)
            if load is not None:
                self._end_load(load, report.failed)

    @staticmethod
    def _end_ahead(report: JobReport) -> None:
        """Nothing fails after the copy is under way but the GPU itself, and then no answer of this engine is right."""
        if report.failed:
            raise DynamoConnectorsError("the GPU failed while a request was computed on a load; restart the engine")

    def _end_load(self, load: LoadJob, failed: Mapping[BlockKey, str]) -> None:
        self._loaded_requests.add(load.request_id)
        bad = {item.block for item in load.items if item.key in failed} | set(load.missing_blocks)
        if not bad:
            return
        if self._num_groups == 1:
            self._bad_blocks |= bad
        else:
            self._failed_requests.add(load.request_id)
        log.warning(
            "dynamo: %d of %d blocks of request %s could not be loaded (%s); vLLM recomputes from there",
            len(bad),
            len(load.items) + len(load.missing_blocks),
            load.request_id,
            ", ".join(sorted(set(failed.values()))) or "evicted",
        )
