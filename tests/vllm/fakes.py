"""Plain stand-ins for vLLM's request and HBM block pool, for tests of the scheduler half alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dynamo_connectors.block_manager import BlockManager, Change, NamedTier
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.tiers.index import TierIndex
from dynamo_connectors.vllm.groups import Geometry, Group
from dynamo_connectors.vllm.live import Gate, Limits
from dynamo_connectors.vllm.messages import StepPlan, WorkerReports
from dynamo_connectors.vllm.scheduler import SchedulerHalf

BLOCK = 16
#: A test's clock: it stands still unless the test moves it.
NOW = [0.0]


@dataclass
class FakeRequest:
    request_id: str
    block_hashes: list[BlockKey]
    kv_transfer_params: Any = None
    max_tokens: int = 8

    @property
    def num_tokens(self) -> int:
        return len(self.block_hashes) * BLOCK

    num_prompt_tokens = num_tokens


def request(name: str, blocks: int, prefix: str = "", **hints: Any) -> FakeRequest:
    """Requests with the same `prefix` share block hashes."""
    hashes = [BlockKey(f"{prefix or name}-{index}".encode()) for index in range(blocks)]
    return FakeRequest(name, hashes, hints or None)


@dataclass
class FakeHolds:
    held: Counter[int] = field(default_factory=Counter)

    def hold(self, block_ids: Sequence[int]) -> None:
        self.held.update(block_ids)

    def release(self, block_ids: Sequence[int]) -> None:
        self.held.subtract(block_ids)
        assert min(self.held.values()) >= 0

    @property
    def held_blocks(self) -> int:
        return self.held.total()


class NoEvents:
    def describe(self, request: Any, group: int, first: int, keys: Sequence[BlockKey]) -> None: ...

    def publish(self, changes: Sequence[Change]) -> None: ...

    def take(self) -> Iterable[Any]:
        return ()


@dataclass
class Setting:
    """What a test may choose of a scheduler half."""

    dram: int = 8
    disk: int = 0
    #: Objects of two blocks.
    objects: int = 0
    workers: int = 1
    groups: tuple[Group, ...] = (Group(BLOCK),)
    offload_ratio: float = 1.0
    max_held_blocks: int = 100
    gate: Gate | None = None
    lasting: tuple[str, ...] = ()
    find_seconds: float = 0.0
    min_touches: dict[str, int] = field(default_factory=dict)


def make(**chosen: Any) -> tuple[SchedulerHalf, FakeHolds]:
    setting = Setting(**chosen)
    tiers = [NamedTier("host_dram", TierIndex(setting.dram))]
    if setting.disk:
        tiers.append(NamedTier("nvme_ssd", TierIndex(setting.disk)))
    if setting.objects:
        tiers.append(NamedTier("object_store", TierIndex(setting.objects, erases=True), chunk_blocks=2))
    limits = Limits(
        geometry=Geometry(setting.groups, BLOCK),
        offload_ratio=setting.offload_ratio,
        num_workers=setting.workers,
        max_held_blocks=setting.max_held_blocks,
        block_bytes=1000,
        lasting_tiers=setting.lasting,
        find_seconds=setting.find_seconds,
    )
    manager = BlockManager(tiers, setting.min_touches)
    half = SchedulerHalf(manager, limits, NoEvents(), setting.gate, lambda: NOW[0])
    holds = FakeHolds()
    half.bind_holds(holds, FakeHolds())
    return half, holds


def end(half: SchedulerHalf, plan: StepPlan, failed: dict[int, dict[BlockKey, str]] | None = None) -> None:
    """One worker ends every job of `plan`."""
    jobs = [*plan.stores, *plan.loads, *plan.moves, *plan.erasures]
    half.worker_reports(WorkerReports({job.job_id: 1 for job in jobs}, failed or {}))


def offer_all(half: SchedulerHalf, what: FakeRequest, *tables: list[int]) -> StepPlan:
    half.new_request(what)
    half.offer(what.request_id, len(tables[0]) * BLOCK, 0, lambda: tables)
    return half.plan(is_idle=False)


def settle(half: SchedulerHalf) -> None:
    """Lets everything that is under way come to its end."""
    while half.has_work:
        end(half, half.plan(is_idle=True))


def keep(half: SchedulerHalf, name: str, *tables: list[int], **hints: Any) -> FakeRequest:
    """A request comes, its blocks are kept, and it goes."""
    what = request(name, len(tables[0]), **hints)
    end(half, offer_all(half, what, *tables))
    half.finished(what, tables, len(tables[0]) * BLOCK)
    settle(half)
    return what


def load(half: SchedulerHalf, what: FakeRequest, *tables: list[int]) -> StepPlan:
    half.new_request(what)
    tokens = half.matched_tokens(what, 0)
    assert tokens is not None
    half.after_alloc(what, tables, tokens)
    return half.plan(is_idle=False)
