"""The KV block manager: one answer to "where is this block", over all tiers below HBM. Pure, no I/O, no threads.

Blocks enter at the first tier (`reserve`, then `commit` or `abort`), sink towards the last one (`take_spills`, then
`end_spill`), and are read from the fastest tier that holds them (`lease`, then `release`). Whoever moves the bytes is
told slots, and reports back; until it does, the slots it works on can neither be evicted nor re-used.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.tiers.index import IndexStats, TierIndex


class Target(NamedTuple):
    """A slot of the first tier to be filled with `key`."""

    key: BlockKey
    slot: int


class Source(NamedTuple):
    """A leased block: `tier` is its position in the manager's order, 0 the fastest."""

    key: BlockKey
    tier: int
    slot: int


class Spill(NamedTuple):
    """A copy from one tier to the next one down."""

    key: BlockKey
    tier: int
    source_slot: int
    target_slot: int


class Change(NamedTuple):
    """A block appeared in a tier, or left it."""

    kind: Literal["stored", "removed"]
    tier: int
    key: BlockKey


@dataclass(frozen=True)
class NamedTier:
    name: str
    index: TierIndex


#: Copies down that may wait, and that may run, at one time; of the first tier at most half is pinned by them. Beyond it
#: the newest are dropped: a slow disk must not take DRAM away from requests.
MAX_SPILLS = 256


class BlockManager:
    """Tiers in order of speed, fastest first."""

    def __init__(self, tiers: Sequence[NamedTier]) -> None:
        if not tiers:
            raise ValueError("a block manager needs at least one tier")
        self.tiers = tuple(tiers)
        self._max_spills = min(MAX_SPILLS, max(1, tiers[0].index.capacity_blocks // 2))
        #: Blocks that may still sink: (tier, key), oldest first.
        self._sinking: deque[tuple[int, BlockKey]] = deque()
        #: Per tier: slot -> number of leases.
        self._leases: tuple[dict[int, int], ...] = tuple({} for _ in tiers)
        self._targets: set[Target] = set()
        self._spills: set[Spill] = set()
        self._changes: list[Change] = []
        #: Blocks that were not kept, by reason.
        self.dropped: Counter[str] = Counter()

    def match(self, keys: Sequence[BlockKey]) -> int:
        """Length of the leading run of `keys` that can be read from some tier. Changes nothing."""
        run = self.tiers[0].index.lookup(keys)
        indexes = [tier.index for tier in self.tiers]
        for key in islice(keys, run, None):
            if not any(key in index for index in indexes):
                break
            run += 1
        return run

    def lease(self, keys: Sequence[BlockKey]) -> list[Source]:
        """Protects the leading run of `keys`; every source goes back through `release`, whatever happens."""
        sources: list[Source] = []
        for key in keys:
            source = self._lease_one(key)
            if source is None:
                break
            sources.append(source)
        return sources

    def release(self, sources: Iterable[Source], damaged: AbstractSet[BlockKey] = frozenset()) -> None:
        """Ends leases. Blocks named in `damaged` gave no bytes, or wrong ones: they are never served again."""
        released = list(sources)
        for source in released:
            leases = self._leases[source.tier]
            if source.slot not in leases:
                raise AssertionError(f"{source} is not leased")
            leases[source.slot] -= 1
            if not leases[source.slot]:
                del leases[source.slot]
            index = self.tiers[source.tier].index
            if source.key in damaged and index.slot_of(source.key) == source.slot:
                self._discard(source.tier, source.key)
                self.dropped["damaged"] += 1
            index.unpin(source.slot)
        self.touch([source.key for source in released])

    def touch(self, chain: Sequence[BlockKey]) -> None:
        """Marks a chain as just used in every tier, so that its tail is evicted before the head it hangs on."""
        for tier in self.tiers:
            tier.index.touch(chain)

    def reserve(self, keys: Iterable[BlockKey]) -> list[Target]:
        """Slots for those of `keys` that the first tier does not know yet, in order.

        Stops at the first block that finds no room, because the blocks behind it could not be used without it. Every
        target goes back through `commit` or `abort`.
        """
        index = self.tiers[0].index
        wanted = [key for key in dict.fromkeys(keys) if not index.is_known(key)]
        targets: list[Target] = []
        for key in wanted:
            slot = index.reserve(key)
            if slot is None:
                self.dropped["tier_busy"] += len(wanted) - len(targets)
                break
            targets.append(Target(key, slot))
        self._targets.update(targets)
        self._note_evictions(0)
        return targets

    def commit(self, target: Target) -> None:
        """The bytes of `target` are complete: the block can be read, and sinks one tier further."""
        self._end_fill(target)
        self._committed(0, target.key, target.slot)

    def abort(self, target: Target, reason: str) -> None:
        self._end_fill(target)
        self.tiers[0].index.abort(target.slot)
        self.dropped[reason] += 1

    def take_spills(self) -> list[Spill]:
        """Copies to start now. Each one goes back through `end_spill`."""
        started: list[Spill] = []
        while self._sinking and len(self._spills) < self._max_spills:
            tier, key = self._sinking.popleft()
            spill = self._start_spill(tier, key)
            if spill is not None:
                started.append(spill)
        return started

    def end_spill(self, spill: Spill, ok: bool) -> None:
        self._spills.remove(spill)
        source = self.tiers[spill.tier].index
        # The source leaves the index when it is found damaged, or reset: what was copied from it is in doubt too.
        trusted = source.slot_of(spill.key) == spill.source_slot
        source.unpin(spill.source_slot)
        if ok and trusted:
            self._committed(spill.tier + 1, spill.key, spill.target_slot)
        else:
            self.tiers[spill.tier + 1].index.abort(spill.target_slot)
            self.dropped["spill_failed" if not ok else "source_gone"] += 1

    def clear(self) -> None:
        """Forgets every block (weights changed, cache reset). Transfers in flight end in peace and are not kept."""
        self._sinking.clear()
        for position, tier in enumerate(self.tiers):
            for key in tier.index.readable_keys():
                self._changes.append(Change("removed", position, key))
            tier.index.clear()

    def take_changes(self) -> list[Change]:
        """What appeared and left since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    @property
    def spills_in_flight(self) -> int:
        return len(self._spills)

    @property
    def has_spills_waiting(self) -> bool:
        return bool(self._sinking)

    def stats(self) -> dict[str, IndexStats]:
        return {tier.name: tier.index.stats() for tier in self.tiers}

    def check(self) -> None:
        """Asserts every invariant. O(capacity)."""
        expected: Counter[tuple[int, int]] = Counter()
        for position, leases in enumerate(self._leases):
            for slot, count in leases.items():
                assert count > 0, f"tier {position} slot {slot} is leased {count} times"
                expected[position, slot] += count
        for spill in self._spills:
            expected[spill.tier, spill.source_slot] += 1
        for position, tier in enumerate(self.tiers):
            tier.index.check()
            pinned = tier.index.pinned_slots()
            wanted = {slot: count for (where, slot), count in expected.items() if where == position}
            assert pinned == wanted, f"{tier.name}: pins {pinned} differ from leases and spills {wanted}"
        assert len(self._spills) <= self._max_spills, "too many spills in flight"

    def _end_fill(self, target: Target) -> None:
        # A late second report would otherwise end the fill of whoever has the slot now.
        if target not in self._targets:
            raise AssertionError(f"{target} is not being filled")
        self._targets.remove(target)

    def _lease_one(self, key: BlockKey) -> Source | None:
        for position, tier in enumerate(self.tiers):
            slot = tier.index.pin(key)
            if slot is not None:
                leases = self._leases[position]
                leases[slot] = leases.get(slot, 0) + 1
                return Source(key, position, slot)
        return None

    def _start_spill(self, tier: int, key: BlockKey) -> Spill | None:
        below = self.tiers[tier + 1].index
        if below.is_known(key):
            return None
        if key not in self.tiers[tier].index:
            self.dropped["source_gone"] += 1
            return None
        target_slot = below.reserve(key)
        self._note_evictions(tier + 1)
        if target_slot is None:
            self.dropped["tier_busy"] += 1
            return None
        source_slot = self.tiers[tier].index.pin(key)
        assert source_slot is not None, "a readable block could not be pinned"
        spill = Spill(key, tier, source_slot, target_slot)
        self._spills.add(spill)
        return spill

    def _committed(self, tier: int, key: BlockKey, slot: int) -> None:
        if not self.tiers[tier].index.commit(slot):
            self.dropped["reset"] += 1
            return
        self._changes.append(Change("stored", tier, key))
        if tier + 1 < len(self.tiers):
            if len(self._sinking) >= MAX_SPILLS:
                self.dropped["spill_backlog"] += 1
                return
            self._sinking.append((tier, key))

    def _discard(self, tier: int, key: BlockKey) -> None:
        self._changes.append(Change("removed", tier, key))
        self.tiers[tier].index.discard(key)

    def _note_evictions(self, tier: int) -> None:
        for key in self.tiers[tier].index.take_evicted():
            self._changes.append(Change("removed", tier, key))
