"""`--kv-connector dynamo`: vLLM's connector interface, translated into calls on the two halves and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from dynamo_connectors.config import KvbmConfig, parse_config
from dynamo_connectors.errors import DynamoConnectorsError
from dynamo_connectors.host_limits import check_host
from dynamo_connectors.tiers.index_stats import IndexStats
from dynamo_connectors.vllm import setup
from dynamo_connectors.vllm.compat import (
    BlockTables,
    HbmHolds,
    engine_logger,
    is_answered,
    kind_of_step,
    layout_to_divide,
    loads_within_step,
    log_where_the_engine_logs,
    tokens_in_flight,
)
from dynamo_connectors.vllm.messages import StepPlan, WorkerReports
from dynamo_connectors.vllm.metrics import KvbmPromMetrics, KvbmStats
from dynamo_connectors.vllm.peers import divides_heads
from dynamo_connectors.vllm.scheduler import SchedulerHalf
from dynamo_connectors.vllm.worker import WorkerHalf

log = engine_logger(__name__)


class DynamoConnector(KVConnectorBase_V1, SupportsHMA):
    """One instance per process: in EngineCore it drives a `SchedulerHalf`, in each worker a `WorkerHalf`.

    With `--kvbm-storage-tiers hbm` it has neither half, and vLLM runs as if it were not there.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        log_where_the_engine_logs()
        self._scheduler: SchedulerHalf | None = None
        self._told_tiers: Mapping[str, IndexStats] = {}
        self._worker: WorkerHalf | None = None
        self._block_tables = BlockTables()
        #: The plan of this step until its offloads are started.
        self._unsaved: StepPlan | None = None
        try:
            self._config: KvbmConfig = parse_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
            check_host(self._config)
            if not self._config.has_tiers:
                return
            setup.check_model(vllm_config, kv_cache_config, self._config.compression)
            if role == KVConnectorRole.SCHEDULER:
                self._scheduler = setup.build_scheduler_half(self._config, vllm_config, kv_cache_config)
        except DynamoConnectorsError as error:
            log.error("dynamo: %s", error)
            raise

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: a block that is not kept costs a recompute, never an answer."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Asked for where the environment names none, as by vLLM's NixlConnector; vLLM takes another one if it must."""
        try:
            config = parse_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        except DynamoConnectorsError:
            return None  # the constructor says why
        return layout_to_divide() if divides_heads(config, vllm_config) else None

    # Scheduler half

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.bind_holds(HbmHolds(gpu_block_pool), HbmHolds(gpu_block_pool))

    def on_new_request(self, request: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self._scheduler is None:
            return 0, False
        tokens = self._scheduler.matched_tokens(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.after_alloc(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        if self._scheduler is None:
            return StepPlan()
        self._offer_computed_blocks(self._scheduler, scheduler_output)
        return self._scheduler.plan(is_idle=scheduler_output.total_num_scheduled_tokens == 0)

    def update_connector_output(self, connector_output: Any) -> None:
        reports = connector_output.kv_connector_worker_meta
        if self._scheduler is not None and isinstance(reports, WorkerReports):
            self._scheduler.worker_reports(reports)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is None:
            return False, None
        computed = max(0, request.num_computed_tokens - tokens_in_flight(request))
        answered = is_answered(request)
        self._scheduler.finished(request, block_ids, computed, answered)
        return False, self._scheduler.hand_off(request, computed) if answered else None

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.has_work

    def take_events(self) -> Iterable[Any]:
        """vLLM's scheduler calls this once at the end of every step, events wanted or not."""
        if self._scheduler is None:
            return ()
        self._scheduler.step_ended()
        return self._scheduler.take_events()

    def reset_cache(self) -> bool | None:
        return self._scheduler.reset() if self._scheduler is not None else True

    # Worker half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if not self._config.has_tiers:
            return
        try:
            self._worker = setup.build_worker_half(self._config, self._vllm_config, self._kv_cache_config, kv_caches)
        except DynamoConnectorsError as error:
            log.error("dynamo: %s", error)
            raise

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Before the step computes, whenever `start_load_kv` is called: the V2 runner calls that after it."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.begin(self._plan(), kind_of_step())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._unsaved = self._plan()
            self._worker.start_loads(self._unsaved)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nearly all loads are complete, or in the stream's own order; the others arrive layer by layer."""
        if self._worker is not None:
            self._worker.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Whole blocks are offloaded over all layers at once, after the step."""

    def wait_for_save(self) -> None:
        if self._worker is not None and self._unsaved is not None and not self._unsaved.is_idle:
            self._worker.end_step()
        self._start_offloads()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._unsaved is not None and self._unsaved.is_idle:
            self._start_offloads()
        return None, self._worker.take_loaded_requests() if self._worker is not None else None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        results = super().get_transfer_results(finished_req_ids)
        if self._worker is not None:
            results.failed_recving |= self._worker.take_failed_requests()
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_bad_blocks() if self._worker is not None else set()

    def build_connector_worker_meta(self) -> WorkerReports | None:
        return self._worker.take_reports() if self._worker is not None else None

    # Both

    def get_kv_connector_stats(self) -> KvbmStats | None:
        if self._scheduler is not None:
            tiers = self._scheduler.tier_stats()
            stats = KvbmStats.of_scheduler(self._scheduler.take_counts(), None if tiers == self._told_tiers else tiers)
            self._told_tiers = tiers
        elif self._worker is not None:
            worker = self._worker
            stats = KvbmStats.of_worker(worker.take_transfers(), worker.take_failures(), worker.levels())
        else:
            return None
        return None if stats.is_empty() else stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvbmStats | None:
        return KvbmStats(data=data) if data is not None else KvbmStats()

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> KvbmPromMetrics:
        return KvbmPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _plan(self) -> StepPlan:
        plan = self._get_connector_metadata()
        if not isinstance(plan, StepPlan):
            raise TypeError(f"expected the dynamo scheduler's plan, got {type(plan).__name__}")
        return plan

    def _start_offloads(self) -> None:
        """Once a step, after all that it computes, a draft model's KV too: in `wait_for_save`.

        vLLM before 0.31 leaves that out in steps that compute nothing, where `get_finished` stands in.
        """
        plan, self._unsaved = self._unsaved, None
        if self._worker is not None and plan is not None:
            self._worker.start_offloads(plan)

    def _offer_computed_blocks(self, scheduler: SchedulerHalf, scheduler_output: Any) -> None:
        self._block_tables.follow(scheduler_output)
        cached = scheduler_output.scheduled_cached_reqs
        computed = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        scheduled = scheduler_output.num_scheduled_tokens
        loads = loads_within_step(scheduler_output)
        scheduler.step_planned(computed, scheduled, may_fail=bool(loads))
        for request_id, tokens in computed.items():
            # Blocks are offloaded by the step that computes them, or by the next one where no step tells.
            fresh = scheduled.get(request_id, 0) if loads is not None else 0
            scheduler.offer(request_id, tokens, fresh, partial(self._block_tables.blocks_of, request_id))
