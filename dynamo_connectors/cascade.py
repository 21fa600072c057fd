"""Copies between the tiers below HBM: down when a block has been used often enough, up when a request will want it.

A copy waits (nothing is pinned), is started by `take` (its source is pinned, its target FILLING) and ended by `end`.
Everything is bounded: what does not fit is dropped and counted, and tried again when the block is used again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, repeat
from typing import NamedTuple

from dynamo_connectors.blocks import BlockKey, records
from dynamo_connectors.tier_stack import NamedTier, Place, TierStack

#: Copies that may run at one time, up and down to each tier; each takes a quarter of the first tier at most. Apart, so
#: that a tier that is slow, or dead, does not hold up the copies to the others.
MAX_MOVES = 256
#: Copies that may wait, likewise: the blocks of one prompt of 128k tokens. They pin nothing.
MAX_WAITING = 8192


class Move(NamedTuple):
    """A copy of one block between two tiers.

    With `chunk`, one side is row `row` of that object. All rows of a chunk that is written are moved in one job.
    """

    key: BlockKey
    source_tier: str
    target_tier: str
    source_slot: int
    target_slot: int
    chunk: BlockKey | None = None
    row: int = 0


def jobs_of(moves: Sequence[Move]) -> Iterator[list[Move]]:
    """`moves` as `BlockManager.take_moves` gave them, split into what belongs together."""
    for (_, _, chunk), group in groupby(moves, key=lambda move: (move.source_tier, move.target_tier, move.chunk)):
        together = list(group)
        yield from ([together] if chunk is not None else ([move] for move in together))


class _Down(NamedTuple):
    """From the first tier: one block, or all blocks of a chunk. `parent` is the entry before it in the target."""

    target: str
    blocks: tuple[BlockKey, ...]
    parent: BlockKey | None


class _Up(NamedTuple):
    """Into the first tier. `above` is the entry before it in the source."""

    source: str
    key: BlockKey
    place: Place
    parent: BlockKey | None
    above: BlockKey | None


@dataclass
class _Fill:
    """A target slot on its way: it is complete when all moves into it have ended well.

    A chain stays in order (its tail is evicted first) in the target, by the entry before it, `parent`, and in the
    source, by the entry before each block's, `above`.
    """

    blocks: tuple[BlockKey, ...]
    parent: BlockKey | None
    above: tuple[BlockKey | None, ...]
    moves_left: int
    reason: str | None = None
    #: Some of its bytes may lie in the target.
    is_sent: bool = False


class Cascade:
    """`min_touches`: tier -> how many requests must have used a block before it goes there."""

    def __init__(self, stack: TierStack, min_touches: Mapping[str, int]) -> None:
        self._stack = stack
        self._min_touches = {tier.name: min_touches.get(tier.name, 1) for tier in stack.tiers}
        self._max_waiting = MAX_WAITING
        self._max_moves = min(MAX_MOVES, max(1, stack.first.index.capacity_blocks // 4))
        #: Target tier -> entry -> what shall go down, and block -> what shall come up; oldest first.
        self._downs: dict[str, OrderedDict[BlockKey, _Down]] = {tier.name: OrderedDict() for tier in stack.lower}
        self._ups: OrderedDict[BlockKey, _Up] = OrderedDict()
        self._moves: set[Move] = set()
        self._fills: dict[tuple[str, int], _Fill] = {}
        #: Target tier -> moves to it.
        self._moves_to: Counter[str] = Counter()

    @property
    def in_flight(self) -> int:
        return len(self._moves)

    @property
    def has_waiting(self) -> bool:
        return bool(self._ups) or any(self._downs.values())

    def offer(self, key: BlockKey, parent: BlockKey | None) -> None:
        """A block arrived in the first tier: it goes on to every tier of single blocks that admits it by now."""
        touches = self._stack.first.index.touches(key)
        for target in self._stack.lower:
            if target.chunk_blocks == 1 and touches >= self._min_touches[target.name]:
                self._queue_down(_Down(target.name, (key,), parent))

    def offload(self, chain: Sequence[BlockKey]) -> None:
        """Offers all blocks of a chain, given from its first block on, to every tier that admits them by now."""
        touches = self._stack.first.index.readable_touches(chain)
        for target in self._stack.lower:
            size, least, below = target.chunk_blocks, self._min_touches[target.name], target.index.readable
            if size == 1:
                self._queue_blocks(target, chain, [at for at, uses in enumerate(touches) if uses >= least])
                continue
            for end in range(size, len(chain) + 1, size):
                if chain[end - 1] not in below and min(touches[end - size : end]) >= least:
                    parent = chain[end - size - 1] if end > size else None
                    self._queue_down(_Down(target.name, tuple(chain[end - size : end]), parent))

    def prefetch(self, chain: Sequence[BlockKey]) -> int:
        """Brings the leading run of a chain, given from its first block on, into the first tier.

        Returns how many copies wait for it now.
        """
        first, waiting = self._stack.first.index, 0
        first.touch(chain)  # the room for its tail must not be made by evicting its head
        for position, key in enumerate(chain):
            if first.is_known(key):
                continue
            found = self._stack.find(chain, position)
            if found is None:
                break
            if key not in self._ups and len(self._ups) >= self._max_waiting:
                self._stack.dropped["prefetch_backlog"] += 1
                break
            tier, place = found
            above = position - position % tier.chunk_blocks - 1
            up = _Up(
                tier.name,
                key,
                place,
                parent=chain[position - 1] if position else None,
                above=chain[above] if above >= 0 else None,
            )
            self._ups.setdefault(key, up)
            waiting += 1
        return waiting

    def take(self) -> list[Move]:
        """Copies to start now, the ones that a request waits for first."""
        started: list[Move] = []
        while self._ups and self._moves_to[self._stack.first.name] < self._max_moves:
            _, up = self._ups.popitem(last=False)
            started += self._start_up(up)
        for target, downs in self._downs.items():
            while downs:
                running, blocks = self._moves_to[target], len(next(iter(downs.values())).blocks)
                if running and running + blocks > self._max_moves:
                    break
                _, down = downs.popitem(last=False)
                started += self._start_down(down)
        return started

    def end(self, move: Move, ok: bool, sent: bool = False) -> tuple[BlockKey, BlockKey | None] | None:
        """Returns the block that can be read from the first tier now, with its parent, if there is one.

        `sent`: bytes of it may lie in the target because of it. A copy that found them there already has sent none.
        """
        self._moves.remove(move)
        source, target = self._stack.by_name[move.source_tier], self._stack.by_name[move.target_tier]
        is_up = target is self._stack.first
        self._moves_to[target.name] -= 1
        fill = self._fills[target.name, move.target_slot]
        fill.moves_left -= 1
        # The source leaves the index when it is found damaged, or reset: what was copied from it is in doubt too.
        name = move.chunk if is_up and move.chunk is not None else move.key
        if source.index.slot_of(name) != move.source_slot:
            fill.reason = fill.reason or "source_gone"
        fill.is_sent |= sent
        if not ok:
            fill.reason = "move_failed"
        source.index.unpin(move.source_slot, fill.above[0 if is_up else move.row])
        if fill.moves_left:
            return None
        del self._fills[target.name, move.target_slot]
        if fill.reason is not None:
            if fill.is_sent:
                self._stack.spoil(target, move.target_slot, fill.blocks[-1])
            else:
                target.index.abort(move.target_slot)
            self._stack.dropped[fill.reason] += len(fill.blocks)
            return None
        kept = self._stack.commit(target, move.target_slot, fill.blocks, fill.parent)
        return (move.key, fill.parent) if kept and is_up else None

    def clear(self) -> None:
        for downs in self._downs.values():
            downs.clear()
        self._ups.clear()

    def pins(self) -> Counter[tuple[str, int]]:
        """(tier, slot) -> pins held by copies in flight."""
        return Counter((move.source_tier, move.source_slot) for move in self._moves)

    def check(self) -> None:
        """Asserts every invariant. O(moves)."""
        targets = Counter((move.target_tier, move.target_slot) for move in self._moves)
        assert targets == {place: fill.moves_left for place, fill in self._fills.items()}, "moves and fills disagree"
        running = Counter(move.target_tier for move in self._moves)
        assert running == +self._moves_to, "moves are miscounted"
        most = max(map(len, self._downs.values()), default=0)
        assert max(len(self._ups), most) <= self._max_waiting, "too many copies wait"
        for tier in self._stack.tiers:
            assert running[tier.name] <= max(self._max_moves, tier.chunk_blocks), f"too many copies to {tier.name}"

    def _queue_down(self, down: _Down) -> None:
        entry, waiting = down.blocks[-1], self._downs[down.target]
        if entry in waiting or self._stack.by_name[down.target].index.is_known(entry):
            return
        if len(waiting) >= self._max_waiting:
            self._stack.dropped["move_backlog"] += len(down.blocks)
            return
        waiting[entry] = down

    def _queue_blocks(self, target: NamedTier, chain: Sequence[BlockKey], admitted: Sequence[int]) -> None:
        """`_queue_down` of single blocks, by their places in the chain: at once, because a request waits meanwhile."""
        waiting, readable, filling = self._downs[target.name], target.index.readable, target.index.filling
        due = [at for at in admitted if not ((key := chain[at]) in readable or key in waiting or key in filling)]
        room = self._max_waiting - len(waiting)
        if len(due) > room:
            self._stack.dropped["move_backlog"] += len(due) - room
            del due[room:]
        keys = [chain[at] for at in due]
        parents = [chain[at - 1] if at else None for at in due]
        waiting.update(zip(keys, records(_Down, repeat(target.name), zip(keys, strict=True), parents), strict=True))

    def _start_down(self, down: _Down) -> list[Move]:
        first, target = self._stack.first, self._stack.by_name[down.target]
        name = down.blocks[-1]
        if target.index.is_known(name):
            return []
        if not all(key in first.index for key in down.blocks):
            self._stack.dropped["source_gone"] += len(down.blocks)
            return []
        touches = min(first.index.touches(key) for key in down.blocks)
        slot = self._reserve(target, name, touches, len(down.blocks))
        if slot is None:
            return []
        chunk = name if target.chunk_blocks > 1 else None
        moves = [
            Move(key, first.name, target.name, _pin(first, key), slot, chunk, row)
            for row, key in enumerate(down.blocks)
        ]
        self._fills[target.name, slot] = _Fill(down.blocks, down.parent, (down.parent, *down.blocks[:-1]), len(moves))
        self._moves.update(moves)
        self._moves_to[target.name] += len(moves)
        return moves

    def _start_up(self, up: _Up) -> list[Move]:
        first, source = self._stack.first, self._stack.by_name[up.source]
        if first.index.is_known(up.key):
            return []
        if up.place.name not in source.index:
            self._stack.dropped["source_gone"] += 1
            return []
        slot = self._reserve(first, up.key, max(1, self._stack.touches_below(up.key)), 1)
        if slot is None:
            return []
        chunk = up.place.name if source.chunk_blocks > 1 else None
        move = Move(up.key, source.name, first.name, _pin(source, up.place.name), slot, chunk, up.place.row)
        self._fills[first.name, slot] = _Fill((up.key,), up.parent, (up.above,), 1)
        self._moves.add(move)
        self._moves_to[first.name] += 1
        return [move]

    def _reserve(self, tier: NamedTier, name: BlockKey, touches: int, blocks: int) -> int | None:
        slot = self._stack.reserve(tier, name, touches)
        if slot is None:
            self._stack.dropped["tier_busy"] += blocks
        return slot


def _pin(tier: NamedTier, name: BlockKey) -> int:
    slot = tier.index.pin(name)
    assert slot is not None, f"a readable block of {tier.name} could not be pinned"
    return slot
