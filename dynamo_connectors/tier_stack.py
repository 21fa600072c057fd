"""The tiers below HBM, fastest first, and the record of what appears in them and what leaves. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Literal, NamedTuple

from dynamo_connectors.blocks import BlockKey, records
from dynamo_connectors.tiers.index import TierIndex

#: Blocks of a run that are looked up at once, to begin with: twice as many each time, so a chain of short runs costs no
#: more than a small multiple of its length, and a long run is a few calls.
_LOOK_AHEAD = 8


class Change(NamedTuple):
    """A block appeared in a tier, or left it."""

    kind: Literal["stored", "removed"]
    tier: str
    key: BlockKey


class Place(NamedTuple):
    """Where a block can lie in a tier: row `row` of the entry `name` of its index. Without chunks: row 0 of itself."""

    name: BlockKey
    row: int


class Run(NamedTuple):
    """Blocks [start, stop) of a chain, all served by `tier`. `place` is the first one's; of a chunk it is the only."""

    tier: NamedTier
    place: Place
    start: int
    stop: int


@dataclass(frozen=True)
class NamedTier:
    """`index` has one entry per chunk: `chunk_blocks` consecutive blocks of one chain, aligned, named by the last.

    Block keys are chained, so the last one stands for all before it; a chain that ends inside a chunk has no name for
    it. One block a chunk is an ordinary tier.
    """

    name: str
    index: TierIndex
    chunk_blocks: int = 1

    def place_of(self, chain: Sequence[BlockKey], position: int) -> Place | None:
        """Where block `position` of a chain, given from its first block on, belongs. Says not whether it is there."""
        row = position % self.chunk_blocks
        last = position - row + self.chunk_blocks - 1
        return Place(chain[last], row) if last < len(chain) else None


class TierStack:
    """`changes` since they were taken last, and blocks that were not kept (`dropped`), by reason."""

    def __init__(self, tiers: Sequence[NamedTier]) -> None:
        if not tiers:
            raise ValueError("a block manager needs at least one tier")
        if tiers[0].chunk_blocks != 1:
            raise ValueError(f"the first tier, {tiers[0].name}, takes single blocks")
        self.tiers = tuple(tiers)
        self.first, self.lower = tiers[0], tuple(tiers[1:])
        self.by_name = {tier.name: tier for tier in tiers}
        if len(self.by_name) != len(tiers):
            raise ValueError(f"two tiers have one name: {[tier.name for tier in tiers]}")
        self._readable = tuple((tier, tier.index.readable) for tier in tiers)
        self._single_below = tuple(tier for tier in self.lower if tier.chunk_blocks == 1)
        self.changes: list[Change] = []
        self.dropped: Counter[str] = Counter()
        #: Chunk tier -> chunk -> its blocks, and how many chunks have a block: chains that part inside a chunk share
        #: some. A chunk that was restored is known by its last block only.
        self._blocks: dict[str, dict[BlockKey, tuple[BlockKey, ...]]] = {
            tier.name: {} for tier in tiers if tier.chunk_blocks > 1
        }
        self._holders: dict[str, Counter[BlockKey]] = {name: Counter() for name in self._blocks}

    def find(self, chain: Sequence[BlockKey], position: int) -> tuple[NamedTier, Place] | None:
        """The fastest tier that can serve block `position` of `chain`, and where it lies there."""
        key = chain[position]
        for tier, readable in self._readable:
            if tier.chunk_blocks == 1:
                if key in readable:
                    return tier, Place(key, 0)
                continue
            place = tier.place_of(chain, position)
            if place is not None and place.name in readable:
                return tier, place
        return None

    def runs(self, chain: Sequence[BlockKey], start: int, end: int) -> Iterator[Run]:
        """What `find` says of the blocks from `start` on, up to `end` or to the first that no tier can serve.

        Neighbours in one tier of single blocks are one run.
        """
        position = start
        while position < end:
            found = self.find(chain, position)
            if found is None:
                return
            tier, place = found
            stop = self._run_end(tier, chain, position, end) if tier.chunk_blocks == 1 else position + 1
            yield Run(tier, place, position, stop)
            position = stop

    def _run_end(self, tier: NamedTier, chain: Sequence[BlockKey], position: int, end: int) -> int:
        """The end of the run of single blocks of `tier` that no faster tier has as well."""
        rank = self.tiers.index(tier)
        if any(faster.chunk_blocks > 1 for faster in self.tiers[:rank]):
            return position + 1
        has = tier.index.readable.__contains__
        begin, ahead = position + 1, _LOOK_AHEAD
        while begin < end:
            rest = chain[begin : min(end, begin + ahead)]
            served = list(map(has, rest))
            for faster in self.tiers[:rank]:
                readable = faster.index.readable
                served = [here and key not in readable for key, here in zip(rest, served, strict=True)]
            if False in served:
                return begin + served.index(False)
            begin, ahead = begin + len(rest), 2 * ahead
        return end

    def touches_below(self, key: BlockKey) -> int:
        """How many requests have used a block, as far as the tiers of single blocks below the first know."""
        most = 0
        for tier in self._single_below:
            most = max(most, tier.index.touches(key))
        return most

    def reserve(self, tier: NamedTier, name: BlockKey, touches: int) -> int | None:
        """A slot to fill. Counts what was evicted for it."""
        slot = tier.index.reserve(name, touches)
        for evicted in tier.index.take_evicted():
            self._removed(tier, evicted)
        return slot

    def commit(self, tier: NamedTier, slot: int, blocks: Sequence[BlockKey], parent: BlockKey | None) -> bool:
        """The bytes of `blocks`, a chunk or one block, are complete. False when they were reset meanwhile.

        `parent` is the entry before them in their chain.
        """
        if not tier.index.commit(slot, parent):
            self.dropped["reset"] += len(blocks)
            return False
        self._stored(tier, blocks)
        return True

    def commit_all(self, slots: Sequence[int], chain: Sequence[BlockKey]) -> list[bool]:
        """The bytes of blocks of one chain are complete in the first tier. False for what was reset meanwhile."""
        kept = self.first.index.commit_all(slots)
        here = [key for key, is_kept in zip(chain, kept, strict=True) if is_kept]
        self.changes += records(Change, repeat("stored"), repeat(self.first.name), here)
        if len(here) < len(kept):
            self.dropped["reset"] += len(kept) - len(here)
        return kept

    def spoil(self, tier: NamedTier, slot: int, name: BlockKey) -> None:
        """`slot` was not filled, but bytes of it may lie in the tier: objects are erased, slots are written again.

        A store that does not erase any more keeps no more than a small share of the tier waiting for that.
        """
        index = tier.index
        if index.erases and index.stats().evicting_blocks <= index.capacity_blocks // 64:
            index.discard(name)
            index.commit(slot)
        else:
            index.abort(slot)

    def restore(self, tier: NamedTier, slot: int, name: BlockKey, touches: int) -> bool:
        if not tier.index.restore(slot, name, touches):
            return False
        self._stored(tier, (name,))
        return True

    def discard(self, tier: NamedTier, name: BlockKey) -> None:
        """Never serve the entry again."""
        if name in tier.index:
            self._removed(tier, name)
        tier.index.discard(name)

    def clear(self) -> None:
        for tier in self.tiers:
            for name in tier.index.readable_keys():
                self._removed(tier, name)
            tier.index.clear()

    def check(self) -> None:
        """Asserts every invariant. O(capacity)."""
        for tier in self.tiers:
            tier.index.check()
            if tier.chunk_blocks > 1:
                chunks = self._blocks[tier.name]
                assert chunks.keys() == tier.index.readable.keys(), f"{tier.name}: the blocks of other chunks are known"
                holders = Counter(key for blocks in chunks.values() for key in blocks)
                assert holders == self._holders[tier.name], f"{tier.name}: the chunks of a block are miscounted"

    def _stored(self, tier: NamedTier, blocks: Sequence[BlockKey]) -> None:
        if tier.chunk_blocks == 1:
            self.changes.append(Change("stored", tier.name, blocks[0]))
        else:
            self._blocks[tier.name][blocks[-1]] = tuple(blocks)
            holders = self._holders[tier.name]
            self.changes += [Change("stored", tier.name, key) for key in blocks if key not in holders]
            holders.update(blocks)

    def _removed(self, tier: NamedTier, name: BlockKey) -> None:
        gone: Sequence[BlockKey] = (name,)
        if tier.chunk_blocks > 1:
            holders, blocks = self._holders[tier.name], self._blocks[tier.name].pop(name)
            gone = [key for key in blocks if holders[key] == 1]
            holders.subtract(blocks)
            for key in gone:
                del holders[key]
        self.changes += [Change("removed", tier.name, key) for key in gone]
