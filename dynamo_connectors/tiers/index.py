"""One tier's index: which block lies in which slot, in which state (`block_state.py`). O(1) per block, no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.config import MOST_TOUCHES
from dynamo_connectors.eviction import EvictionPolicy, LruPolicy
from dynamo_connectors.tiers.block_state import (
    ABSENT,
    EVICTING,
    FILLING,
    LEASED,
    QUARANTINED,
    READY,
    TRANSITIONS,
    BlockState,
)
from dynamo_connectors.tiers.index_stats import IndexStats

#: Looked up once: a prompt's blocks are pinned and unpinned by the thousand.
_PIN, _UNPIN = TRANSITIONS["pin"], TRANSITIONS["unpin"]


class TierIndex:
    """Slots 0 .. capacity_blocks - 1 of one tier. Not thread-safe: its owner serialises the calls."""

    def __init__(self, capacity_blocks: int, policy: EvictionPolicy | None = None, erases: bool = False) -> None:
        if capacity_blocks < 1:
            raise ValueError(f"a tier needs at least one slot, not {capacity_blocks}")
        self.capacity_blocks = capacity_blocks
        self._order = policy if policy is not None else LruPolicy(capacity_blocks)
        self.erases = erases
        #: A store that erases slowly must not have the whole tier evicted by those who wait for room.
        self._most_evicting = 1 + capacity_blocks // 64
        #: key -> slot of the READY and LEASED blocks. Apart from the others, so that a lookup is one membership test.
        self._ready: dict[BlockKey, int] = {}
        self._filling: dict[BlockKey, int] = {}
        #: What has left the index but may have bytes in the store still: QUARANTINED and EVICTING, where `erases`.
        self._leaving: dict[BlockKey, int] = {}
        #: The key of every slot that is not ABSENT.
        self._key_of: list[BlockKey | None] = [None] * capacity_blocks
        self._state = bytearray(capacity_blocks)
        #: How many requests have used the block of a slot, up to 255.
        self._touches = bytearray(capacity_blocks)
        #: slot -> number of readers; absent means none.
        self._pins: Counter[int] = Counter()
        #: ABSENT slots: those that were in use once, and all from `_fresh` on unless a block was restored there.
        self._free: list[int] = []
        self._fresh = 0
        self._quarantined = 0
        self._evicting = 0
        self._evicted: list[BlockKey] = []
        self._erasures: list[tuple[BlockKey, int]] = []
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

    def state_of(self, slot: int) -> BlockState:
        return BlockState(self._state[slot])

    def touches(self, key: BlockKey) -> int:
        """How many requests have used a block that is here or on its way here, at most 255; 0 for others."""
        slot = self._ready.get(key, self._filling.get(key))
        return 0 if slot is None else self._touches[slot]

    def readable_touches(self, keys: Sequence[BlockKey]) -> list[int]:
        """`touches` of every block that can be read now, 0 for the others."""
        find, touches = self._ready.get, self._touches
        return [0 if (slot := find(key)) is None else touches[slot] for key in keys]

    @property
    def readable(self) -> Mapping[BlockKey, int]:
        """key -> slot of what can be read now: a live view, for lookups without a call per block."""
        return self._ready

    @property
    def filling(self) -> Mapping[BlockKey, int]:
        """key -> slot of what is on its way here, likewise."""
        return self._filling

    def reserve(self, key: BlockKey, touches: int = 1) -> int | None:
        """A slot to fill with `key`, evicting the oldest unpinned block if need be.

        None when `key` is already known or every slot is in use: the caller drops the block.
        """
        if key in self._ready or key in self._filling or key in self._leaving:
            return None
        self._order.expect(key)
        slot = self._take_free()
        if slot is None:
            return None
        if self.erases and not self._has_free():
            self._evict_one()  # ahead: the place takes a while to become free
        self._order.enter(slot)
        self._step("reserve", slot)
        self._filling[key] = slot
        self._key_of[slot] = key
        self._touches[slot] = min(touches, MOST_TOUCHES)
        return slot

    def restore(self, slot: int, key: BlockKey, touches: int = 1) -> bool:
        """Takes in a block that an earlier process left in `slot`, as the newest. False when either is taken."""
        if not 0 <= slot < self.capacity_blocks or self._state[slot] != ABSENT or slot < self._fresh:
            return False
        if key in self._ready or key in self._filling or key in self._leaving:
            return False
        self._order.expect(key)
        self._order.enter(slot)
        self._step("restore", slot)
        self._ready[key] = slot
        self._key_of[slot] = key
        self._touches[slot] = min(touches, MOST_TOUCHES)
        self._order.add(slot)
        return True

    def commit(self, slot: int, parent: BlockKey | None = None) -> bool:
        """The bytes of `slot` are complete. False when the block was dropped meanwhile.

        `parent` is the block before it in its chain: the new one is placed to be evicted right before it, because it
        is worth nothing without it. Without one, or while the parent is read, it counts as just used.
        """
        if is_kept := self._fill(slot):
            self._order_below(slot, parent)
        return is_kept

    def commit_all(self, slots: Sequence[int]) -> list[bool]:
        """`commit` of the blocks of one chain, given in its order: the first one becomes the newest."""
        kept = list(map(self._fill, slots))
        self._order.add_all([slot for slot, is_kept in zip(slots, kept, strict=True) if is_kept][::-1])
        return kept

    def abort(self, slot: int) -> None:
        """The bytes of `slot` never came."""
        self._refuse_pinned(slot, "abort")
        was_quarantined = self._state[slot] == QUARANTINED
        self._step("abort", slot)
        key = self._key(slot)
        if was_quarantined:
            self._quarantined -= 1
            self._leaving.pop(key, None)
        else:
            del self._filling[key]
        self._free_slot(slot)

    def pin(self, key: BlockKey) -> int | None:
        """Protects a readable block until `unpin`; returns its slot, or None when it cannot be read."""
        return self.pin_all((key,))[0] if key in self._ready else None

    def unpin(self, slot: int, parent: BlockKey | None = None) -> None:
        """Ends one pin. After the last the block is placed as by `commit`."""
        pins = self._pins.get(slot, 0)
        if pins < 1:
            raise AssertionError(f"slot {slot} is not pinned")
        if pins > 1:
            self._pins[slot] = pins - 1
            return
        del self._pins[slot]
        if self._step("unpin", slot) == READY:
            self._order_below(slot, parent)
        else:
            self._quarantined -= 1
            self._leave(slot)

    def pin_all(self, keys: Sequence[BlockKey]) -> list[int]:
        """`pin` of each of `keys`, all of which can be read; returns their slots."""
        slots = [self._ready[key] for key in keys]
        self._order.remove_all(slots)
        states = self._state
        for slot in slots:
            states[slot] = _PIN[states[slot]]
        self._pins.update(slots)
        return slots

    def unpin_all(self, slots: Sequence[int]) -> None:
        """`unpin` of each: the last one becomes the newest."""
        states, pins, free = self._state, self._pins, []
        for slot in slots:
            left = pins.pop(slot, 0) - 1
            if left > 0:
                pins[slot] = left
                continue
            if left < 0:
                raise AssertionError(f"slot {slot} is not pinned")
            states[slot] = state = _UNPIN[states[slot]]
            if state == READY:
                free.append(slot)
            else:
                self._quarantined -= 1
                self._leave(slot)
        self._order.add_all(free)

    def use_all(self, keys: Iterable[BlockKey]) -> None:
        """One more request uses each of `keys` that is known here: the last one becomes the newest."""
        ready, filling, touches, slots = self._ready, self._filling, self._touches, []
        for key in keys:
            slot = ready.get(key, filling.get(key))
            if slot is None:
                continue
            if touches[slot] < MOST_TOUCHES:
                touches[slot] += 1
            slots.append(slot)
        self._order.use_all(slots)

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Marks a chain as just used, its head last, so that tails are evicted before the heads they hang on."""
        find = self._ready.get
        self._order.renew_all([slot for key in reversed(keys) if (slot := find(key)) is not None])

    def discard(self, key: BlockKey) -> None:
        """Never serve `key` from here again (bad bytes, reset). Readers and writers in flight finish in peace."""
        slot = self._ready.pop(key, None)
        if slot is None:
            slot = self._filling.pop(key, None)
            if slot is None:
                return
        if self._step("discard", slot) == QUARANTINED:
            self._quarantined += 1
            if self.erases:
                self._leaving[key] = slot
        else:
            self._order.remove(slot)
            self._leave(slot)

    def evict(self, blocks: int) -> int:
        """Evicts up to `blocks` blocks, oldest first; returns how many."""
        evicted = 0
        while evicted < blocks and self._evict_one():
            evicted += 1
        return evicted

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

    def take_erasures(self) -> list[tuple[BlockKey, int]]:
        """What is to be erased, with the slot that `erased` wants back then. Empty unless the tier `erases`."""
        erasures, self._erasures = self._erasures, []
        return erasures

    def erased(self, slot: int) -> None:
        """The bytes of an EVICTING block are gone."""
        self._step("erased", slot)
        self._evicting -= 1
        del self._leaving[self._key(slot)]
        self._free_slot(slot)

    def stats(self) -> IndexStats:
        return IndexStats(
            capacity_blocks=self.capacity_blocks,
            ready_blocks=len(self._ready),
            filling_blocks=len(self._filling),
            pinned_blocks=len(self._pins),
            evicting_blocks=self._evicting,
            quarantined_blocks=self._quarantined,
            evicted_blocks_total=self._evicted_total,
        )

    def check(self) -> None:
        """Asserts every invariant. O(capacity)."""
        absent = [slot for slot in range(self.capacity_blocks) if self._state[slot] == ABSENT]
        fresh = [slot for slot in absent if slot >= self._fresh]
        assert sorted([*self._free, *fresh]) == absent, "the free slots and the ABSENT ones differ"
        for slot in absent:
            assert self._key_of[slot] is None, f"ABSENT slot {slot} still has a key"
        gone = {QUARANTINED, EVICTING}
        for blocks, states in ((self._ready, {READY, LEASED}), (self._filling, {FILLING}), (self._leaving, gone)):
            for key, slot in blocks.items():
                state = self._state[slot]
                assert self._key_of[slot] == key, f"slot {slot} is indexed under a key it does not hold"
                assert state in states, f"slot {slot} is indexed as what it is not: {BlockState(state).name}"
        assert len(self._ready) == self._state.count(READY) + self._state.count(LEASED), "a served slot is in no list"
        assert len(self._filling) == self._state.count(FILLING), "a FILLING slot is in no list"
        assert self._quarantined == self._state.count(QUARANTINED), "QUARANTINED slots are miscounted"
        assert self._evicting == self._state.count(EVICTING), "EVICTING slots are miscounted"
        known = [*self._ready, *self._filling, *self._leaving]
        assert len(set(known)) == len(known), "a block is here twice"
        assert len(self._leaving) == (self._quarantined + self._evicting if self.erases else 0), (
            "what is to be erased is miscounted"
        )
        for slot in range(self.capacity_blocks):
            state, pins = self._state[slot], self._pins.get(slot, 0)
            assert (slot in self._order) == (state == READY), f"slot {slot}: eviction order and state disagree"
            is_right = state in (LEASED, QUARANTINED) if pins else state != LEASED
            assert is_right, f"slot {slot} is {BlockState(state).name} with {pins} pins"
        assert len(self._order) == self._state.count(READY), "the eviction order is miscounted"
        self._order.check()

    def _step(self, event: str, slot: int) -> int:
        state = TRANSITIONS[event].get(self._state[slot])
        if state is None:
            self._refuse(event, slot)
        self._state[slot] = state
        return state

    def _refuse(self, event: str, slot: int) -> NoReturn:
        expected = " or ".join(BlockState(state).name for state in TRANSITIONS[event])
        raise AssertionError(f"{event} of slot {slot}, which is {self.state_of(slot).name}, expected {expected}")

    def _refuse_pinned(self, slot: int, event: str) -> None:
        if slot in self._pins:  # QUARANTINED by a reader: nobody fills it
            self._refuse(event, slot)

    def _key(self, slot: int) -> BlockKey:
        key = self._key_of[slot]
        assert key is not None, f"slot {slot} is {self.state_of(slot).name} and holds no block"
        return key

    def _fill(self, slot: int) -> bool:
        self._refuse_pinned(slot, "commit")
        if self._step("commit", slot) == EVICTING:
            self._quarantined -= 1
            self._leave(slot)
            return False
        key = self._key(slot)
        self._ready[key] = self._filling.pop(key)
        return True

    def _order_below(self, slot: int, parent: BlockKey | None) -> None:
        above = None if parent is None else self._ready.get(parent)
        if above is not None and above in self._order:
            self._order.add_below(slot, above)
        else:
            self._order.add(slot)

    def _has_free(self) -> bool:
        while self._fresh < self.capacity_blocks and self._state[self._fresh] != ABSENT:
            self._fresh += 1  # a block was restored there
        return bool(self._free) or self._fresh < self.capacity_blocks

    def _take_free(self) -> int | None:
        if not self._has_free():
            self._evict_one()
            if not self._free:
                return None
        if self._free:
            return self._free.pop()
        self._fresh += 1
        return self._fresh - 1

    def _evict_one(self) -> bool:
        slot = self._order.victim()
        if slot is None or self._evicting >= self._most_evicting:
            return False
        key = self._key(slot)
        self._step("evict", slot)
        del self._ready[key]
        self._order.remove(slot)
        self._order.evicted(slot, key)
        self._evicted.append(key)
        self._evicted_total += 1
        self._leave(slot)
        return True

    def _leave(self, slot: int) -> None:
        """What happens to a slot when it becomes EVICTING."""
        if self.erases:
            key = self._key(slot)
            self._evicting += 1
            self._leaving[key] = slot
            self._erasures.append((key, slot))
            return
        self._state[slot] = ABSENT
        self._free_slot(slot)

    def _free_slot(self, slot: int) -> None:
        self._key_of[slot] = None
        if slot < self._fresh:
            self._free.append(slot)
