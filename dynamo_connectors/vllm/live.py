"""What the scheduler half knows of a request, and the limits it works under. Plain records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from dynamo_connectors.block_manager import Change
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.vllm.groups import Chains, Geometry
from dynamo_connectors.vllm.handoff import Offered
from dynamo_connectors.vllm.hints import Hints

#: The HBM block ids of a request, one table per KV cache group.
Tables: TypeAlias = Sequence[Sequence[int]]


class Holds(Protocol):
    """Keeps HBM blocks from being re-used (`compat.HbmHolds`)."""

    def hold(self, block_ids: Sequence[int]) -> None: ...
    def release(self, block_ids: Sequence[int]) -> None: ...
    @property
    def held_blocks(self) -> int: ...


class ChangeSink(Protocol):
    """Hears of every block that appears or leaves (`kv_events.TierEvents`)."""

    def describe(self, request: Any, group: int, first: int, keys: Sequence[BlockKey]) -> None: ...
    def publish(self, changes: Sequence[Change]) -> None: ...
    def take(self) -> Iterable[Any]: ...


class Gate(Protocol):
    """Load or compute, whichever is faster (`load_gate.LoadGate`)."""

    def expect_load(self, tier: str, bytes_per_second: float) -> None: ...
    def observe_load(self, tier: str, num_bytes: int, seconds: float) -> None: ...
    def observe_prefill(self, tokens: int, seconds: float) -> None: ...
    def admit(self, run: Sequence[str], block_bytes: int, block_tokens: int) -> int: ...
    def expected_load_seconds(self, tier: str, num_bytes: int) -> float | None: ...
    def expected_step_seconds(self, tokens: int) -> float: ...


@dataclass(frozen=True)
class Limits:
    geometry: Geometry
    offload_ratio: float
    num_workers: int
    #: HBM blocks that offloads may hold at one time. Beyond it running requests wait and finished ones are not kept.
    max_held_blocks: int
    #: Bytes of one block on one worker.
    block_bytes: int
    #: Whether copies go on beside compute: not where the engine's own thread makes both.
    copies_beside: bool = True
    #: Whether the engine's own prefix cache hands loaded blocks on to others; without it nobody need wait for a load.
    shares_loads: bool = True
    #: Tiers that may hold blocks of an earlier run.
    lasting_tiers: tuple[str, ...] = ()
    #: How long the first requests wait to hear what an earlier run left there.
    find_seconds: float = 0.0


@dataclass
class Live:
    """A request between its arrival and its end."""

    request: Any
    chains: Chains
    hints: Hints
    #: Per group: how many of its first blocks have been offered to the block manager.
    offered: list[int]
    #: Tokens that were in HBM when the engine last asked.
    local_tokens: int = 0
    #: It has no HBM blocks yet.
    is_queued: bool = True
    #: A step has been planned with it since it got its HBM blocks. Until then they may hold anything: the tokens that
    #: another connector loads asynchronously count as computed from the start.
    has_run: bool = False
    #: Its use of its blocks has been counted.
    is_noted: bool = False
    #: It did not wait any longer to hear what an earlier run left.
    is_early: bool = False
    #: A load for it failed: it computes the rest, however long a store takes to recover.
    is_disappointed: bool = False
    #: What another engine has computed for it.
    offer: Offered | None = None

    @property
    def request_id(self) -> str:
        return str(self.request.request_id)
