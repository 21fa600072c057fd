"""The jobs that workers have not all ended yet, and what each of them holds in the scheduler half."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, groupby
from operator import attrgetter

from dynamo_connectors.block_manager import Erasure, Move, Source, Target
from dynamo_connectors.blocks import BlockKey, records
from dynamo_connectors.cascade import jobs_of
from dynamo_connectors.config import HOST_DRAM, NVME_SSD
from dynamo_connectors.jobs import (
    EraseJob,
    ExportJob,
    LoadItem,
    LoadJob,
    Moved,
    MoveItem,
    MoveJob,
    StoreItem,
    StoreJob,
)
from dynamo_connectors.verdicts import add_failures
from dynamo_connectors.vllm.messages import StepPlan, WorkerReports

#: Blocks that travel to or from the disk as one job: each job costs the engine's thread about as much as a block does.
_BATCH_BLOCKS = 16


@dataclass
class Running:
    """A job that workers have not all ended yet. It stores, loads, moves, erases or exports."""

    workers_left: int
    failed: dict[BlockKey, str] = field(default_factory=dict)
    #: Blocks on their way from HBM: the slot to fill, and the HBM block that is held.
    stores: tuple[tuple[Target, int], ...] = ()
    loads: tuple[Source, ...] = ()
    moves: tuple[Move, ...] = ()
    erasures: tuple[Erasure, ...] = ()
    exports: tuple[Source, ...] = ()
    #: Nobody waits for its end.
    is_patient: bool = False
    moved: list[Moved] = field(default_factory=list)
    #: Bytes of `moves` may lie in their target, on at least one worker.
    is_sent: bool = False
    #: The request that waits for `loads`.
    loading: str | None = None


class JobLedger:
    """Numbers jobs, keeps them until every worker has ended them, and collects them for the next plan."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._jobs: dict[int, Running] = {}
        self._ids = count(1)
        self._loads: list[LoadJob] = []
        self._stores: list[StoreJob] = []
        self._moves: list[MoveJob] = []
        self._erasures: list[EraseJob] = []
        self._exports: list[ExportJob] = []
        self._announced: list[bytes] = []
        self._watch: list[bytes] = []
        self._unwatch: list[bytes] = []

    def store(self, stores: tuple[tuple[Target, int], ...]) -> None:
        items = tuple(StoreItem(key, block, slot) for (key, slot), block in stores)
        self._stores.append(StoreJob(self._start(Running(self._num_workers, stores=stores)), items))

    def load(
        self,
        request_id: str,
        sources: Sequence[Source],
        blocks: Sequence[int],
        missing: Iterable[int],
        may_run_ahead: bool = False,
        by_layers: bool = False,
    ) -> bool:
        """Fills HBM blocks, each from its source; `missing` are blocks whose source is gone.

        Returns whether the workers may let it run ahead: never what may fail.
        """
        assert len(sources) == len(blocks), f"{len(sources)} sources for {len(blocks)} blocks"
        # A lease may be thousands of blocks, and its request waits: field by field is the fast way.
        keys, tiers, slots, chunks, rows = zip(*sources, strict=True) if sources else ((), (), (), (), ())
        items = tuple(records(LoadItem, keys, tiers, slots, blocks, chunks, rows))
        job_id = self._start(Running(self._num_workers, loads=tuple(sources), loading=request_id))
        lost = tuple(missing)
        runs_ahead = may_run_ahead and not lost and set(tiers) == {HOST_DRAM}
        self._loads.append(LoadJob(job_id, request_id, items, lost, runs_ahead, runs_ahead and by_layers))
        return runs_ahead

    def move(self, moves: Sequence[Move]) -> None:
        for parts in _batches(moves):
            items = tuple(
                MoveItem(part.key, part.source_slot, part.target_slot, part.chunk, part.row) for part in parts
            )
            job_id = self._start(Running(self._num_workers, moves=tuple(parts)))
            self._moves.append(MoveJob(job_id, parts[0].source_tier, parts[0].target_tier, items))

    def erase(self, erasures: Sequence[Erasure]) -> None:
        for tier in dict.fromkeys(erasure.tier for erasure in erasures):
            parts = tuple(erasure for erasure in erasures if erasure.tier == tier)
            job_id = self._start(Running(self._num_workers, erasures=parts, is_patient=True))
            self._erasures.append(EraseJob(job_id, tier, tuple(part.key for part in parts)))

    def announce(self, lease: bytes) -> None:
        self._announced.append(lease)

    def export(self, lease: bytes, sources: tuple[Source, ...]) -> None:
        """Lets a peer read leased blocks of host memory."""
        assert all(source.tier == HOST_DRAM for source in sources), "peers read host memory only"
        job_id = self._start(Running(self._num_workers, exports=sources, is_patient=True))
        self._exports.append(ExportJob(job_id, lease, tuple((source.key, source.slot) for source in sources)))

    def watch(self, ticket: bytes) -> None:
        self._watch.append(ticket)

    def unwatch(self, ticket: bytes) -> None:
        self._unwatch.append(ticket)

    def blocks_ahead(self) -> int:
        """Blocks of the next plan's loads that may run ahead."""
        return sum(len(load.items) for load in self._loads if load.may_run_ahead)

    def take_plan(self, forget: bool, is_idle: bool, hides_loads: bool) -> StepPlan:
        plan = StepPlan(
            loads=self._loads,
            stores=self._stores,
            moves=self._moves,
            erasures=self._erasures,
            exports=self._exports,
            announced=self._announced,
            watch=self._watch,
            unwatch=self._unwatch,
            forget=forget,
            is_idle=is_idle,
            hides_loads=hides_loads,
        )
        self._loads, self._stores, self._moves, self._erasures = [], [], [], []
        self._exports, self._announced, self._watch, self._unwatch = [], [], [], []
        return plan

    def hear(self, reports: WorkerReports) -> Iterator[Running]:
        """The jobs that every worker has ended now."""
        for job_id, ended in reports.ended.items():
            job = self._jobs[job_id]
            add_failures(job.failed, reports.failed.get(job_id, {}))
            job.is_sent |= job_id in reports.sent
            job.moved += reports.moved.get(job_id, ())
            job.workers_left -= ended
            if job.workers_left <= 0:
                del self._jobs[job_id]
                yield job

    @property
    def has_urgent(self) -> bool:
        """Whether somebody waits for a job to end, or for workers to hear of something.

        Nobody waits for the end of an erasure, whose store may never be reached, nor of an export; nor for long for a
        move, whose disk may hang (`has_moves`).
        """
        told_late = self._exports or self._announced or self._unwatch
        return bool(told_late) or any(not (job.is_patient or job.moves) for job in self._jobs.values())

    @property
    def has_moves(self) -> bool:
        return any(job.moves for job in self._jobs.values())

    def loading_requests(self) -> set[str]:
        return {job.loading for job in self._jobs.values() if job.loading is not None}

    def held_blocks(self) -> int:
        return sum(len(job.stores) for job in self._jobs.values())

    def check(self) -> None:
        planned = {job.job_id for job in self._planned()}
        assert planned <= self._jobs.keys(), "a planned job is not registered"
        for job_id, job in self._jobs.items():
            assert 0 < job.workers_left <= self._num_workers, f"job {job_id}: {job.workers_left} workers left"

    def _planned(self) -> Iterator[LoadJob | StoreJob | MoveJob | EraseJob | ExportJob]:
        return chain(self._loads, self._stores, self._moves, self._erasures, self._exports)

    def _start(self, job: Running) -> int:
        job_id = next(self._ids)
        self._jobs[job_id] = job
        return job_id


def _batches(moves: Sequence[Move]) -> Iterator[list[Move]]:
    """What belongs into one job; to and from the disk, where any slot may fail alone, several of those."""
    for (source, target), group in groupby(moves, key=attrgetter("source_tier", "target_tier")):
        together = list(group)
        if NVME_SSD in (source, target):
            yield from (together[first : first + _BATCH_BLOCKS] for first in range(0, len(together), _BATCH_BLOCKS))
        else:
            yield from jobs_of(together)
