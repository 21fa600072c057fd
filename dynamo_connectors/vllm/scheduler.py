"""The scheduler half: owns the index, decides what is loaded and offloaded, and never touches a byte.

Life of a load:     matched_tokens -> after_alloc (lease) -> plan (LoadJob) -> worker_reports (release)
Life of an offload: offer (reserve, hold the HBM block) -> plan (StoreJob) -> worker_reports (commit or abort, let go)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

from dynamo_connectors.admission import admitted_blocks
from dynamo_connectors.block_manager import BlockManager, Change, Source, Spill, Target
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.jobs import LoadItem, LoadJob, SpillItem, SpillJob, StoreItem, StoreJob
from dynamo_connectors.tiers.index import IndexStats
from dynamo_connectors.vllm.compat import NULL_BLOCK_ID
from dynamo_connectors.vllm.messages import StepPlan, WorkerReports


class Holds(Protocol):
    """Keeps HBM blocks from being re-used (`compat.HbmHolds`)."""

    def hold(self, block_ids: Sequence[int]) -> None: ...
    def release(self, block_ids: Sequence[int]) -> None: ...
    @property
    def held_blocks(self) -> int: ...


class ChangeSink(Protocol):
    """Hears of every block that appears or leaves (`kv_events.TierEvents`)."""

    def describe(self, request: Any, index: int) -> None: ...
    def publish(self, changes: Sequence[Change]) -> None: ...
    def take(self) -> Iterable[Any]: ...


@dataclass(frozen=True)
class Limits:
    block_size_tokens: int
    offload_ratio: float
    num_workers: int
    #: HBM blocks that offloads may hold at one time. Beyond it running requests wait and finished ones are not kept.
    max_held_blocks: int


@dataclass
class Progress:
    """One live request. Its first `offered_blocks` blocks have been offered to the block manager."""

    request: Any
    offered_blocks: int = 0


@dataclass
class Running:
    """A job that workers have not all ended yet."""

    workers_left: int
    failed: dict[BlockKey, str] = field(default_factory=dict)
    stores: tuple[tuple[Target, int], ...] = ()
    loads: tuple[Source, ...] = ()
    spills: tuple[Spill, ...] = ()
    loading: str | None = None


class SchedulerHalf:
    """One per engine. Called by vLLM's scheduler only, so it needs no lock."""

    def __init__(self, manager: BlockManager, limits: Limits, events: ChangeSink) -> None:
        self._manager = manager
        self._limits = limits
        self._events = events
        self._holds: Holds | None = None
        self._requests: dict[str, Progress] = {}
        #: request -> HBM-resident blocks it had when it was last asked about.
        self._local_blocks: dict[str, int] = {}
        #: Requests whose blocks count as computed while their bytes are still on the way up.
        self._loading: set[str] = set()
        self._jobs: dict[int, Running] = {}
        self._job_ids = count(1)
        self._loads: list[LoadJob] = []
        self._stores: list[StoreJob] = []
        #: What happened since the last `take_counts`, by (what, label).
        self._counts: Counter[tuple[str, str]] = Counter()

    def bind_holds(self, holds: Holds) -> None:
        self._holds = holds

    def new_request(self, request: Any) -> None:
        self._requests[request.request_id] = Progress(request)

    def matched_tokens(self, request: Any, computed_tokens: int) -> int:
        """How many tokens behind `computed_tokens` can be loaded. Changes nothing that others can see."""
        local = computed_tokens // self._limits.block_size_tokens
        self._local_blocks[request.request_id] = local
        return self._manager.match(request.block_hashes[local:]) * self._limits.block_size_tokens

    def after_alloc(self, request: Any, block_ids: Sequence[int], external_tokens: int) -> None:
        """vLLM took up the offer: lease the blocks and plan their load into `block_ids`."""
        local = self._local_blocks.pop(request.request_id, 0)
        blocks = external_tokens // self._limits.block_size_tokens
        if blocks == 0:
            return
        sources = self._manager.lease(request.block_hashes[local : local + blocks])
        targets = block_ids[local : local + blocks]
        items = tuple(
            LoadItem(source.key, source.tier, source.slot, target)
            for source, target in zip(sources, targets, strict=False)
        )
        job_id = self._start(Running(self._limits.num_workers, loads=tuple(sources), loading=request.request_id))
        self._loading.add(request.request_id)
        missing = tuple(targets[len(sources) :])
        self._loads.append(LoadJob(job_id, request.request_id, items, missing))
        self._counts["load_failures", "evicted"] += len(missing)

    def offer(self, request_id: str, computed_tokens: int, block_ids: Callable[[], Sequence[int]]) -> None:
        """Offloads those of the request's computed full blocks that are not kept below HBM yet.

        `computed_tokens` counts tokens whose KV is in HBM once the steps before this one are done. A request whose
        load is still running is left alone: its blocks count as computed, but their bytes are not there yet.
        """
        progress = self._requests.get(request_id)
        if progress is None or self._holds is None or request_id in self._loading:
            return
        request, start = progress.request, progress.offered_blocks
        limit = self._admitted(request, computed_tokens)
        limit = min(limit, start + self._limits.max_held_blocks - self._holds.held_blocks)
        if limit <= start:
            return
        blocks = list(block_ids()[start:limit])
        if NULL_BLOCK_ID in blocks:
            # Out of the attention window: the engine has already let go of these bytes.
            del blocks[blocks.index(NULL_BLOCK_ID) :]
        keys = request.block_hashes[start : start + len(blocks)]
        progress.offered_blocks += len(keys)
        for index in range(start, progress.offered_blocks):
            self._events.describe(request, index)
        block_of = dict(zip(keys, blocks, strict=True))
        targets = self._manager.reserve(keys)
        if targets:
            stores = tuple((target, block_of[target.key]) for target in targets)
            self._start_store(stores)

    def finished(self, request: Any, block_ids: Sequence[int], computed_tokens: int) -> None:
        """Offers the last blocks. vLLM may free them all now: the ones being copied are held until they are copied."""
        request_id = request.request_id
        self.offer(request_id, computed_tokens, lambda: block_ids)
        self._local_blocks.pop(request_id, None)
        progress = self._requests.pop(request_id, None)
        if progress is not None and request_id not in self._loading:
            # Once per request, not per block: its head came in first, and must not be the first to go.
            self._manager.touch(request.block_hashes[: progress.offered_blocks])
            lost = self._admitted(request, computed_tokens) - progress.offered_blocks
            if lost > 0:
                self._counts["dropped_blocks", "hbm_busy"] += lost

    def plan(self, is_idle: bool) -> StepPlan:
        """The jobs that workers start in this step."""
        spills = self._manager.take_spills()
        plan = StepPlan(self._loads, self._stores, [self._start_spill(spill) for spill in spills], is_idle)
        self._loads, self._stores = [], []
        return plan

    def worker_reports(self, reports: WorkerReports) -> None:
        for job_id, ended in reports.ended.items():
            job = self._jobs[job_id]
            job.failed.update(reports.failed.get(job_id, {}))
            job.workers_left -= ended
            if job.workers_left <= 0:
                del self._jobs[job_id]
                self._end(job)
        self._publish()

    def reset(self) -> bool:
        """Weights changed or the user asked: nothing kept so far may be served again.

        False while a load is running: its request would still get the old bytes, so the caller has to ask again.
        """
        self._manager.clear()
        for progress in self._requests.values():
            progress.offered_blocks = 0
        self._publish()
        return not self._loading

    @property
    def has_work(self) -> bool:
        """Whether an idle engine must keep stepping to see a job end, or a block sink."""
        return bool(self._jobs or self._manager.has_spills_waiting)

    def take_events(self) -> Iterable[Any]:
        return self._events.take()

    def tier_stats(self) -> Mapping[str, IndexStats]:
        return self._manager.stats()

    def take_counts(self) -> Mapping[tuple[str, str], int]:
        counts, self._counts = self._counts, Counter()
        for reason, blocks in self._manager.dropped.items():
            counts["dropped_blocks", reason] += blocks
        self._manager.dropped.clear()
        return counts

    def check(self) -> None:
        self._manager.check()
        held = sum(len(job.stores) for job in self._jobs.values())
        assert self._holds is None or self._holds.held_blocks == held, "HBM holds and running stores disagree"
        planned = {load.job_id for load in self._loads} | {store.job_id for store in self._stores}
        assert planned <= self._jobs.keys(), "a planned job is not registered"
        assert self._loading == {job.loading for job in self._jobs.values() if job.loading}, "loading requests differ"
        for job_id, job in self._jobs.items():
            assert 0 < job.workers_left <= self._limits.num_workers, f"job {job_id}: {job.workers_left} workers left"

    def _admitted(self, request: Any, computed_tokens: int) -> int:
        """How many of the request's first blocks may be offloaded by now."""
        full = min(len(request.block_hashes), computed_tokens // self._limits.block_size_tokens)
        return admitted_blocks(full, self._limits.offload_ratio)

    def _start(self, job: Running) -> int:
        job_id = next(self._job_ids)
        self._jobs[job_id] = job
        return job_id

    def _start_store(self, stores: tuple[tuple[Target, int], ...]) -> None:
        assert self._holds is not None
        self._holds.hold([block for _, block in stores])
        job_id = self._start(Running(self._limits.num_workers, stores=stores))
        items = tuple(StoreItem(target.key, block, target.slot) for target, block in stores)
        self._stores.append(StoreJob(job_id, items))

    def _start_spill(self, spill: Spill) -> SpillJob:
        job_id = self._start(Running(self._limits.num_workers, spills=(spill,)))
        return SpillJob(job_id, (SpillItem(spill.key, spill.source_slot, spill.target_slot),))

    def _end(self, job: Running) -> None:
        if job.stores:
            assert self._holds is not None
            self._holds.release([block for _, block in job.stores])
        for target, _ in job.stores:
            if target.key in job.failed:
                self._manager.abort(target, job.failed[target.key])
            else:
                self._manager.commit(target)
                self._counts["offloaded_blocks", self._manager.tiers[0].name] += 1
        self._manager.touch([target.key for target, _ in job.stores])
        if job.loading is not None:
            self._loading.discard(job.loading)
            self._manager.release(job.loads, damaged=job.failed.keys())
            for source in job.loads:
                if source.key in job.failed:
                    self._counts["load_failures", job.failed[source.key]] += 1
                else:
                    self._counts["hit_blocks", self._manager.tiers[source.tier].name] += 1
        for spill in job.spills:
            ok = spill.key not in job.failed
            self._manager.end_spill(spill, ok)
            if ok:
                self._counts["offloaded_blocks", self._manager.tiers[spill.tier + 1].name] += 1

    def _publish(self) -> None:
        self._events.publish(self._manager.take_changes())


def single_group(block_ids: Iterable[Sequence[int]]) -> Sequence[int]:
    """The block ids of the only KV cache group."""
    (only,) = block_ids
    return only
