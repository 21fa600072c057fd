"""What travels between the scheduler half and the worker halves, in vLLM's own envelopes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.jobs import EraseJob, ExportJob, JobReport, LoadJob, Moved, MoveJob, StoreJob
from dynamo_connectors.verdicts import add_failures
from dynamo_connectors.vllm.recovery import Finds, in_common


@dataclass
class StepPlan(KVConnectorMetadata):
    """Scheduler to workers, once per step: the jobs to start."""

    loads: list[LoadJob] = field(default_factory=list)
    stores: list[StoreJob] = field(default_factory=list)
    moves: list[MoveJob] = field(default_factory=list)
    erasures: list[EraseJob] = field(default_factory=list)
    exports: list[ExportJob] = field(default_factory=list)
    #: Leases that will be exported, so that their readers wait.
    announced: list[bytes] = field(default_factory=list)
    #: Tickets of requests that will want a peer's blocks, and of those that want them no more.
    watch: list[bytes] = field(default_factory=list)
    unwatch: list[bytes] = field(default_factory=list)
    #: Before any of them: what lies in the tiers now, and what this process still puts there, outlives nobody.
    forget: bool = False
    #: Nothing is computed in this step, so a worker may wait a moment for a job to end instead of spinning.
    is_idle: bool = False
    #: It is expected to compute for longer than its loads take: the engine's stream may wait for them at its end.
    hides_loads: bool = False


@dataclass
class WorkerReports(KVConnectorWorkerMetadata):
    """Workers to scheduler: the jobs that ended. Summed over workers: a block counts only where all of them kept it."""

    #: job id -> number of workers that ended it.
    ended: dict[int, int] = field(default_factory=dict)
    #: job id -> the keys that failed on at least one worker, with the worst reason that one gave.
    failed: dict[int, dict[BlockKey, str]] = field(default_factory=dict)
    #: job id -> what each worker moved and how long that took.
    moved: dict[int, tuple[Moved, ...]] = field(default_factory=dict)
    #: What workers found in their tiers when they started; each speaks once of each.
    finds: Finds = field(default_factory=dict)
    #: Tier -> bytes a second that the slowest worker measured at start-up.
    rates: dict[str, float] = field(default_factory=dict)
    #: Jobs of which bytes may lie in the tier that they moved blocks to, on at least one worker.
    sent: set[int] = field(default_factory=set)

    @classmethod
    def of(
        cls, reports: Sequence[JobReport], finds: Finds | None = None, rates: dict[str, float] | None = None
    ) -> WorkerReports:
        return cls(
            ended={report.job_id: 1 for report in reports},
            failed={report.job_id: dict(report.failed) for report in reports if report.failed},
            moved={report.job_id: report.moved for report in reports if report.moved},
            finds=finds or {},
            rates=rates or {},
            sent={report.job_id for report in reports if report.sent},
        )

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReports:
        if not isinstance(other, WorkerReports):
            raise TypeError(f"cannot add {type(other).__name__} to the reports of dynamo workers")
        ended = dict(self.ended)
        for job_id, count in other.ended.items():
            ended[job_id] = ended.get(job_id, 0) + count
        failed = {job_id: dict(keys) for job_id, keys in self.failed.items()}
        for job_id, keys in other.failed.items():
            add_failures(failed.setdefault(job_id, {}), keys)
        moved = dict(self.moved)
        for job_id, parts in other.moved.items():
            moved[job_id] = moved.get(job_id, ()) + parts
        rates = {**other.rates, **self.rates}
        for tier in self.rates.keys() & other.rates.keys():
            rates[tier] = min(self.rates[tier], other.rates[tier])
        return WorkerReports(ended, failed, moved, in_common(self.finds, other.finds), rates, self.sent | other.sent)
