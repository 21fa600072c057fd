"""One tier's index: which block lies in which slot, and in which state. Pure bookkeeping, O(1) per block, no I/O.

States of a slot:

    FREE --reserve--> FILLING --commit--> READY --evict--> FREE
                         |                  |  ^
                       abort            pin |  | unpin (last)
                         v                  v  |
                        FREE              READY with pins > 0 (leased: never evicted)

A slot whose content must not be served any more, but which somebody still reads or fills, is DOOMED: it has left the
index, and its slot becomes free at the last unpin, commit or abort.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import takewhile

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.eviction import EvictionPolicy, LruPolicy


class SlotState(IntEnum):
    FREE = 0
    FILLING = 1
    READY = 2
    DOOMED = 3


@dataclass(frozen=True)
class IndexStats:
    """A snapshot. Counts are blocks."""

    capacity_blocks: int
    ready_blocks: int
    filling_blocks: int
    pinned_blocks: int
    doomed_blocks: int
    evicted_blocks_total: int


class TierIndex:
    """Slots 0 .. capacity_blocks - 1 of one tier. Not thread-safe: its owner serialises the calls."""

    def __init__(self, capacity_blocks: int, policy: EvictionPolicy | None = None) -> None:
        if capacity_blocks < 1:
            raise ValueError(f"a tier needs at least one slot, not {capacity_blocks}")
        self.capacity_blocks = capacity_blocks
        self._order = policy if policy is not None else LruPolicy()
        #: key -> slot of the FILLING and of the READY blocks. Apart, so that a lookup is one membership test.
        self._filling: dict[BlockKey, int] = {}
        self._ready: dict[BlockKey, int] = {}
        #: The key of every slot that is not FREE.
        self._key_of: list[BlockKey | None] = [None] * capacity_blocks
        self._state = bytearray(capacity_blocks)
        #: slot -> number of readers; absent means none.
        self._pins: dict[int, int] = {}
        self._free = list(range(capacity_blocks - 1, -1, -1))
        self._evicted: list[BlockKey] = []
        self._evicted_total = 0

    def __contains__(self, key: BlockKey) -> bool:
        """Whether `key` can be read now."""
        return key in self._ready

    def is_known(self, key: BlockKey) -> bool:
        """Whether `key` is here or on its way here."""
        return key in self._ready or key in self._filling

    def slot_of(self, key: BlockKey) -> int | None:
        """The slot of a block that can be read now, else None."""
        return self._ready.get(key)

    def lookup(self, keys: Iterable[BlockKey]) -> int:
        """Length of the leading run of `keys` that can be read now."""
        return sum(1 for _ in takewhile(self._ready.__contains__, keys))

    def reserve(self, key: BlockKey) -> int | None:
        """A slot to fill with `key`, evicting the oldest unpinned block if need be.

        None when `key` is already known or every slot is in use: the caller drops the block.
        """
        if self.is_known(key):
            return None
        if not self._free and not self._evict_one():
            return None
        slot = self._free.pop()
        self._filling[key] = slot
        self._key_of[slot] = key
        self._state[slot] = SlotState.FILLING
        return slot

    def commit(self, slot: int) -> bool:
        """The bytes of `slot` are complete. False when the block was dropped meanwhile."""
        if self._state[slot] == SlotState.DOOMED:
            self._release(slot)
            return False
        key = self._expect(slot, SlotState.FILLING)
        self._state[slot] = SlotState.READY
        self._ready[key] = self._filling.pop(key)
        self._order.add(key)
        return True

    def abort(self, slot: int) -> None:
        """The bytes of `slot` never came."""
        if self._state[slot] != SlotState.DOOMED:
            key = self._expect(slot, SlotState.FILLING)
            del self._filling[key]
        self._release(slot)

    def pin(self, key: BlockKey) -> int | None:
        """Protects a readable block until `unpin`; returns its slot, or None when it cannot be read."""
        slot = self.slot_of(key)
        if slot is None:
            return None
        self._pins[slot] = self._pins.get(slot, 0) + 1
        self._order.remove(key)
        return slot

    def unpin(self, slot: int) -> None:
        """Ends one pin. The block counts as just used."""
        pins = self._pins.get(slot, 0)
        if pins < 1:
            raise AssertionError(f"slot {slot} is not pinned")
        if pins > 1:
            self._pins[slot] = pins - 1
            return
        del self._pins[slot]
        if self._state[slot] == SlotState.DOOMED:
            self._release(slot)
        else:
            self._order.add(self._expect(slot, SlotState.READY))

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Marks a chain as just used, its head last, so that tails are evicted before the heads they hang on."""
        for key in reversed(keys):
            if key in self._order:
                self._order.add(key)

    def discard(self, key: BlockKey) -> None:
        """Never serve `key` from here again (bad bytes, reset). Readers and writers in flight finish in peace."""
        slot = self._ready.pop(key, None)
        if slot is not None:
            self._order.remove(key)
            busy = slot in self._pins
        else:
            slot = self._filling.pop(key, None)
            busy = True
        if slot is None:
            return
        self._state[slot] = SlotState.DOOMED
        if not busy:
            self._release(slot)

    def evict(self, blocks: int) -> int:
        """Frees up to `blocks` slots, oldest first; returns how many."""
        freed = 0
        while freed < blocks and self._evict_one():
            freed += 1
        return freed

    def clear(self) -> None:
        """Forgets every block."""
        for key in [*self._ready, *self._filling]:
            self.discard(key)

    def readable_keys(self) -> list[BlockKey]:
        return list(self._ready)

    def pinned_slots(self) -> dict[int, int]:
        """slot -> number of readers, for slots with at least one."""
        return dict(self._pins)

    def take_evicted(self) -> list[BlockKey]:
        """The blocks evicted to make room since the last call, oldest first."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def stats(self) -> IndexStats:
        return IndexStats(
            capacity_blocks=self.capacity_blocks,
            ready_blocks=len(self._ready),
            filling_blocks=len(self._filling),
            pinned_blocks=len(self._pins),
            doomed_blocks=self.capacity_blocks - len(self._free) - len(self._ready) - len(self._filling),
            evicted_blocks_total=self._evicted_total,
        )

    def check(self) -> None:
        """Asserts every invariant. O(capacity)."""
        used = self.capacity_blocks - len(self._free)
        assert len(set(self._free)) == len(self._free), "a slot is free twice"
        for slot in self._free:
            assert self._state[slot] == SlotState.FREE, f"slot {slot} is in the free list but not FREE"
            assert self._key_of[slot] is None, f"free slot {slot} still has a key"
            assert slot not in self._pins, f"free slot {slot} is pinned"
        assert sum(1 for state in self._state if state != SlotState.FREE) == used, "a used slot is in no list"
        assert self._ready.keys().isdisjoint(self._filling), "a block is readable and being filled"
        for blocks, state in ((self._ready, SlotState.READY), (self._filling, SlotState.FILLING)):
            for key, slot in blocks.items():
                assert self._key_of[slot] == key, f"slot {slot} is indexed under a key it does not hold"
                assert self._state[slot] == state, (
                    f"slot {slot} is {SlotState(self._state[slot]).name}, not {state.name}"
                )
                evictable = state == SlotState.READY and slot not in self._pins
                assert (key in self._order) == evictable, f"slot {slot}: eviction order and state disagree"
        assert len(self._order) <= len(self._ready), "the eviction order holds unknown blocks"
        for slot, pins in self._pins.items():
            assert pins > 0, f"slot {slot} has {pins} pins"
            assert self._state[slot] in (SlotState.READY, SlotState.DOOMED), f"slot {slot} is pinned while not readable"

    def _evict_one(self) -> bool:
        key = self._order.victim()
        if key is None:
            return False
        self._evicted.append(key)
        self._evicted_total += 1
        self.discard(key)
        return True

    def _expect(self, slot: int, state: SlotState) -> BlockKey:
        key = self._key_of[slot]
        if self._state[slot] != state or key is None:
            raise AssertionError(f"slot {slot} is {SlotState(self._state[slot]).name}, expected {state.name}")
        return key

    def _release(self, slot: int) -> None:
        self._state[slot] = SlotState.FREE
        self._key_of[slot] = None
        self._free.append(slot)
