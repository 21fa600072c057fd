"""The KV block manager: one answer to "where is this block", over all tiers below HBM. Pure, no I/O, no threads.

Blocks enter at the first tier (`reserve`, then `commit` or `abort`), are copied to the tiers below once enough requests
have used them and back up ahead of a request (`take_moves`, then `end_move`), and are read from the fastest tier that
holds them (`lease`, then `release`). Whoever moves the bytes is told slots, and reports back; until it does, the slots
it works on can neither be evicted nor re-used.

A `chain` is the keys of a request from its first block on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import groupby, repeat
from operator import attrgetter
from typing import NamedTuple

from dynamo_connectors.admission import TouchSketch
from dynamo_connectors.blocks import BlockKey, records
from dynamo_connectors.cascade import Cascade, Move
from dynamo_connectors.pins import TimedPins
from dynamo_connectors.tier_stack import Change, NamedTier, TierStack
from dynamo_connectors.tiers.index_stats import IndexStats

__all__ = ["BlockManager", "Change", "Erasure", "Move", "NamedTier", "Source", "Target"]


class Target(NamedTuple):
    """A slot of the first tier to be filled with `key`."""

    key: BlockKey
    slot: int


class Source(NamedTuple):
    """A leased block. With `chunk` it is row `row` of that object, and `slot` is the object's."""

    key: BlockKey
    tier: str
    slot: int
    chunk: BlockKey | None = None
    row: int = 0


class Erasure(NamedTuple):
    """An object that has left the index; its place is taken until it is erased."""

    tier: str
    key: BlockKey
    slot: int


class BlockManager:
    """Tiers in order of speed, fastest first; the first takes single blocks.

    `min_touches`: tier -> how many requests must have used a block before the tier takes it; 1 where it says nothing.
    """

    def __init__(self, tiers: Sequence[NamedTier], min_touches: Mapping[str, int] | None = None) -> None:
        self._stack = TierStack(tiers)
        self._min_touches = {tier.name: (min_touches or {}).get(tier.name, 1) for tier in tiers}
        self._cascade = Cascade(self._stack, self._min_touches)
        self._pins = TimedPins(self._stack)
        first = self._stack.first
        #: Counts what no tier holds; nobody asks where the first use is enough.
        self._sketch = TouchSketch(first.index.capacity_blocks) if self._min_touches[first.name] > 1 else None
        #: Per tier: slot -> number of leases.
        self._leases: dict[str, Counter[int]] = {tier.name: Counter() for tier in tiers}
        #: Target -> the block before it in its chain.
        self._targets: dict[Target, BlockKey | None] = {}
        self._single = tuple(tier.index.readable for tier in tiers if tier.chunk_blocks == 1)
        self._chunked = tuple(tier for tier in tiers if tier.chunk_blocks > 1)

    @property
    def tiers(self) -> tuple[NamedTier, ...]:
        return self._stack.tiers

    @property
    def dropped(self) -> Counter[str]:
        """Blocks that were not kept, by reason; whoever reports them clears it."""
        return self._stack.dropped

    def match(self, chain: Sequence[BlockKey], start: int = 0) -> int:
        """Length of the run of `chain` from `start` on that can be read from some tier. Changes nothing."""
        position = start
        while position < len(chain):
            reached = self._chunk_end(chain, self._single_run(chain, position))
            if reached == position:
                break
            position = reached
        return position - start

    def tiers_of(self, chain: Sequence[BlockKey], start: int, end: int) -> list[str]:
        """The name of the tier that would serve each block of the run that `match` finds, up to `end`."""
        names: list[str] = []
        for tier, _, first, stop in self._stack.runs(chain, start, end):
            names += [tier.name] * (stop - first)
        return names

    def lease(self, chain: Sequence[BlockKey], start: int = 0, count: int | None = None) -> list[Source]:
        """Protects the run of `chain` from `start` on, at most `count` blocks.

        Every source goes back through `release`, whatever happens.
        """
        end = len(chain) if count is None else min(len(chain), start + count)
        sources: list[Source] = []
        for tier, place, first, stop in self._stack.runs(chain, start, end):
            leases = self._leases[tier.name]
            if tier.chunk_blocks > 1:
                slots = tier.index.pin_all([place.name])
                sources.append(Source(chain[first], tier.name, slots[0], place.name, place.row))
            else:
                keys = chain[first:stop]
                slots = tier.index.pin_all(keys)
                sources += records(Source, keys, repeat(tier.name), slots, repeat(None), repeat(0))
            leases.update(slots)
        return sources

    def release(self, sources: Iterable[Source], damaged: AbstractSet[BlockKey] = frozenset()) -> None:
        """Ends leases. Blocks named in `damaged` gave no bytes, or wrong ones: they are never served again."""
        newest_last = reversed(list(sources))  # the head of the chain becomes the newest
        for name, run in groupby(newest_last, key=attrgetter("tier")):
            tier, leases, together = self._stack.by_name[name], self._leases[name], list(run)
            slots = [source.slot for source in together]
            for slot in slots:
                left = leases.pop(slot, 0) - 1
                if left < 0:
                    raise AssertionError(f"{name} slot {slot} is not leased")
                if left:
                    leases[slot] = left
            for source in together if damaged else ():
                if source.key in damaged:
                    self._discard_damaged(tier, source.chunk or source.key, source.slot)
            tier.index.unpin_all(slots)

    def note_use(self, chain: Sequence[BlockKey]) -> None:
        """A request uses these blocks. Once per request and block, before its new blocks are reserved.

        Counts for admission to every tier, starts the copies down that are due, and makes the chain just used.
        """
        if self._sketch is not None:
            for key in chain:
                self._sketch.use(key)
        for tier in self._stack.tiers:
            names = chain if tier.chunk_blocks == 1 else chain[tier.chunk_blocks - 1 :: tier.chunk_blocks]
            tier.index.use_all(reversed(names))  # the head becomes the newest
        self._cascade.offload(chain)

    def offload(self, chain: Sequence[BlockKey]) -> None:
        """Starts the copies down of a chain that are due: what was still being filled when the request came."""
        self._cascade.offload(chain)

    def touch(self, chain: Sequence[BlockKey]) -> None:
        """Marks a chain as just used in every tier, so that its tail is evicted before the head it hangs on."""
        for tier in self._stack.tiers:
            size = tier.chunk_blocks
            tier.index.touch(chain if size == 1 else chain[size - 1 :: size])

    def prefetch(self, chain: Sequence[BlockKey]) -> int:
        """Brings a chain into the first tier ahead of its request; returns how many copies wait for that."""
        return self._cascade.prefetch(chain)

    def pin(self, chain: Sequence[BlockKey], until: float) -> int:
        """Keeps the leading run of a chain where it lies until that time; returns its length. See `TimedPins`."""
        return self._pins.pin(chain, until)

    def expire_pins(self, now: float) -> int:
        """Ends the pins whose time has come; returns how many."""
        return self._pins.expire(now)

    def reserve(self, keys: Iterable[BlockKey], parent: BlockKey | None = None) -> list[Target]:
        """Slots for those of `keys`, consecutive blocks of a chain behind `parent`, that the first tier does not know.

        Stops at the first block that finds no room or was not used often enough, because the blocks behind it could not
        be used without it. Every target goes back through `commit` or `abort`.
        """
        first = self._stack.first
        wanted: dict[BlockKey, BlockKey | None] = {}
        readable, filling = first.index.readable, first.index.filling
        for key in keys:
            if key not in readable and key not in filling and key not in wanted:
                wanted[key] = parent
            parent = key
        targets: list[Target] = []
        for key, before in wanted.items():
            touches = self._touches(key)
            is_admitted = touches >= self._min_touches[first.name]
            slot = self._stack.reserve(first, key, max(1, touches)) if is_admitted else None
            if slot is None:
                self.dropped["tier_busy" if is_admitted else "not_admitted"] += len(wanted) - len(targets)
                break
            targets.append(Target(key, slot))
            self._targets[targets[-1]] = before
        return targets

    def commit(self, target: Target) -> None:
        """The bytes of `target` are complete: the block can be read, and goes on down where it is admitted."""
        parent = self._end_fill(target)
        if self._stack.commit(self._stack.first, target.slot, (target.key,), parent):
            self._arrived(target.key, parent)

    def commit_all(self, targets: Sequence[Target]) -> None:
        """`commit` of blocks of one chain, given in its order: the first one becomes the newest."""
        parents = [self._end_fill(target) for target in targets]
        kept = self._stack.commit_all([target.slot for target in targets], [target.key for target in targets])
        for target, parent, is_kept in zip(targets, parents, kept, strict=True):
            if is_kept:
                self._arrived(target.key, parent)

    def abort(self, target: Target, reason: str) -> None:
        self._end_fill(target)
        self._stack.first.index.abort(target.slot)
        self._abandoned(target.key)
        self.dropped[reason] += 1

    def take_moves(self) -> list[Move]:
        """Copies to start, side by side what `cascade.jobs_of` keeps together. Each goes back through `end_move`."""
        return self._cascade.take()

    def end_move(self, move: Move, ok: bool, damaged: bool = False, sent: bool = False) -> None:
        """`damaged`: the source gave wrong bytes, or lost them for good; it is never served again.

        `sent`: it may have left bytes in the target; they are erased if the target is not filled in the end.
        """
        if damaged:
            is_up = move.target_tier == self._stack.first.name
            name = move.chunk if is_up and move.chunk is not None else move.key
            self._discard_damaged(self._stack.by_name[move.source_tier], name, move.source_slot)
        arrived = self._cascade.end(move, ok and not damaged, sent)
        if arrived is not None:
            self._arrived(*arrived)
        elif move.target_tier == self._stack.first.name:
            self._abandoned(move.key)

    def take_erasures(self) -> list[Erasure]:
        """Objects to erase now. Each one goes back through `end_erasure`."""
        return [Erasure(tier.name, key, slot) for tier in self._stack.tiers for key, slot in tier.index.take_erasures()]

    def end_erasure(self, erasure: Erasure) -> None:
        self._stack.by_name[erasure.tier].index.erased(erasure.slot)

    def restore(self, tier: str, entries: Iterable[tuple[int, BlockKey]]) -> int:
        """Takes in what an earlier process left in a tier, oldest first; returns how many entries were taken.

        Before any block goes there. An entry was admitted once, so it counts as used as often as that takes.
        """
        named = self._stack.by_name[tier]
        touches = self._min_touches[tier]
        return sum(self._stack.restore(named, slot, key, touches) for slot, key in entries)

    def clear(self) -> None:
        """Forgets every block (weights changed, cache reset). Transfers in flight end in peace and are not kept."""
        self._cascade.clear()
        self._pins.drop_all()
        self._stack.clear()

    def take_changes(self) -> list[Change]:
        """What appeared and left since the last call, in order."""
        changes, self._stack.changes = self._stack.changes, []
        return changes

    @property
    def moves_in_flight(self) -> int:
        return self._cascade.in_flight

    @property
    def has_moves_waiting(self) -> bool:
        return self._cascade.has_waiting

    def stats(self) -> dict[str, IndexStats]:
        return {tier.name: tier.index.stats().times(tier.chunk_blocks) for tier in self._stack.tiers}

    def check(self) -> None:
        """Asserts every invariant. O(capacity)."""
        self._stack.check()
        self._cascade.check()
        self._pins.check()
        expected = self._cascade.pins() + self._pins.slots()
        for tier, leases in self._leases.items():
            for slot, count in leases.items():
                assert count > 0, f"{tier} slot {slot} is leased {count} times"
                expected[tier, slot] += count
        for named in self._stack.tiers:
            pinned = named.index.pinned_slots()
            wanted = {slot: count for (where, slot), count in expected.items() if where == named.name}
            assert pinned == wanted, f"{named.name}: pins {pinned} differ from leases, moves and timed pins {wanted}"

    def _single_run(self, chain: Sequence[BlockKey], start: int) -> int:
        """The end of the run from `start` on that tiers of single blocks can serve."""
        # Neighbours mostly lie in the same tier, so that one is asked first.
        readable = self._single[0]
        for position in range(start, len(chain)):
            key = chain[position]
            if key not in readable:
                for readable in self._single:
                    if key in readable:
                        break
                else:
                    return position
        return len(chain)

    def _chunk_end(self, chain: Sequence[BlockKey], position: int) -> int:
        """The end of the chunk that block `position` can be read from; `position` when there is none."""
        for tier in self._chunked:
            place = tier.place_of(chain, position)
            if place is not None and place.name in tier.index:
                return position - place.row + tier.chunk_blocks
        return position

    def _touches(self, key: BlockKey) -> int:
        """How many requests have used a block that the first tier does not know, the one that brings it included."""
        seen = 1 if self._sketch is None else self._sketch.uses(key)
        return max(seen, self._stack.touches_below(key))

    def _end_fill(self, target: Target) -> BlockKey | None:
        # A late second report would otherwise end the fill of whoever has the slot now.
        if target not in self._targets:
            raise AssertionError(f"{target} is not being filled")
        return self._targets.pop(target)

    def _arrived(self, key: BlockKey, parent: BlockKey | None) -> None:
        self._pins.arrived(key)
        self._cascade.offer(key, parent)

    def _abandoned(self, key: BlockKey) -> None:
        """A fill of the first tier came to nothing; a pin that waited for it ends, unless there is another one."""
        if not self._stack.first.index.is_known(key):
            self._pins.drop(self._stack.first, key)

    def _discard_damaged(self, tier: NamedTier, name: BlockKey, slot: int) -> None:
        if tier.index.slot_of(name) == slot:
            self._pins.drop(tier, name)
            self._stack.discard(tier, name)
            self.dropped["damaged"] += 1
