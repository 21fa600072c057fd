"""`TierIndex` against a model that keeps everything in plain lists and recomputes instead of remembering."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.tiers.block_state import BlockState
from dynamo_connectors.tiers.index import TierIndex

KEYS = [BlockKey(bytes([number]) * 32) for number in range(5)]
keys = st.sampled_from(KEYS)
chains = st.lists(keys, max_size=5)


@dataclass
class Row:
    """One slot in use: what it holds, whether that may be served, whether somebody fills it, how many read it."""

    key: BlockKey
    served: bool = True
    filling: bool = True
    pins: int = 0
    touches: int = 1

    @property
    def state(self) -> BlockState:
        if self.served and not self.filling:
            return BlockState.LEASED if self.pins else BlockState.READY
        if self.filling or self.pins:
            return BlockState.FILLING if self.served else BlockState.QUARANTINED
        return BlockState.EVICTING


@dataclass
class Model:
    capacity: int
    erases: bool
    rows: dict[int, Row] = field(default_factory=dict)
    #: Slots of READY blocks, the first to be evicted first.
    order: list[int] = field(default_factory=list)
    erasures: list[tuple[BlockKey, int]] = field(default_factory=list)
    restorable: set[int] = field(default_factory=set)

    def slot(self, key: BlockKey, filling: bool = False) -> int | None:
        rows = self.rows.items()
        return next((slot for slot, row in rows if (row.key, row.served, row.filling) == (key, True, filling)), None)

    def known(self, key: BlockKey) -> bool:
        return any(row.key == key and row.served for row in self.rows.values())

    def blocked(self, key: BlockKey) -> bool:
        """Its name is still in use, so that writing it again now could be undone by the erasure to come."""
        return self.erases and any(row.key == key for row in self.rows.values())

    def drop(self, slot: int) -> None:
        row = self.rows[slot]
        row.served = False
        self.order = [other for other in self.order if other != slot]
        self.sweep(slot)

    def sweep(self, slot: int) -> None:
        row = self.rows[slot]
        if row.state == BlockState.EVICTING:
            if self.erases:
                self.erasures.append((row.key, slot))
            else:
                del self.rows[slot]

    def evict(self) -> list[BlockKey]:
        waits = any(row.state == BlockState.EVICTING for row in self.rows.values())
        if not self.order or waits:
            return []
        key = self.rows[self.order[0]].key
        self.drop(self.order[0])
        return [key]


class TierIndexMachine(RuleBasedStateMachine):
    @initialize(capacity=st.integers(1, 4), erases=st.booleans())
    def start(self, capacity: int, erases: bool) -> None:
        self.index = TierIndex(capacity, erases=erases)
        self.model = Model(capacity, erases, restorable=set(range(capacity)))
        self.evicted: list[BlockKey] = []
        self.to_erase: list[tuple[BlockKey, int]] = []

    def slots_where(self, *states: BlockState) -> list[int]:
        return sorted(slot for slot, row in self.model.rows.items() if row.state in states)

    def being_filled(self) -> list[int]:
        return sorted(slot for slot, row in self.model.rows.items() if row.filling)

    def being_read(self) -> list[int]:
        return sorted(slot for slot, row in self.model.rows.items() if row.pins)

    @rule(key=keys, touches=st.integers(1, 300))
    def reserve(self, key: BlockKey, touches: int) -> None:
        model = self.model
        slot = self.index.reserve(key, touches)
        if model.known(key) or model.blocked(key):
            assert slot is None
            return
        if len(model.rows) == model.capacity:
            self.evicted += model.evict()
        if len(model.rows) == model.capacity:
            assert slot is None
            return
        assert slot is not None
        assert slot not in model.rows, "a slot in use was handed out"
        if model.erases and len(model.rows) == model.capacity - 1:
            self.evicted += model.evict()
        model.rows[slot] = Row(key, touches=min(touches, 255))
        model.restorable.discard(slot)

    @rule(key=keys, slot=st.integers(-1, 4), touches=st.integers(1, 3))
    def restore(self, key: BlockKey, slot: int, touches: int) -> None:
        model = self.model
        restored = self.index.restore(slot, key, touches)
        is_free = 0 <= slot < model.capacity and slot not in model.rows and not model.known(key)
        if slot in model.restorable and is_free and not model.blocked(key):
            assert restored, "a slot that was never used refused a block"
        if restored:
            assert is_free
            model.rows[slot] = Row(key, filling=False, touches=touches)
            model.order.append(slot)
            model.restorable.discard(slot)

    @rule(chain=st.permutations(KEYS))
    def fill(self, chain: list[BlockKey]) -> None:
        """What random single steps reach too seldom: a tier full of readable blocks."""
        for key in chain:
            before = set(self.being_filled())
            self.reserve(key, 1)
            for slot in set(self.being_filled()) - before:
                self.commit_slot(slot, None)

    @precondition(lambda self: self.being_filled())
    @rule(data=st.data(), parent=st.none() | keys)
    def commit(self, data: st.DataObject, parent: BlockKey | None) -> None:
        self.commit_slot(data.draw(st.sampled_from(self.being_filled())), parent)

    def commit_slot(self, slot: int, parent: BlockKey | None) -> None:
        row = self.model.rows[slot]
        assert self.index.commit(slot, parent) == row.served
        row.filling = False
        if row.served:
            above = None if parent is None else self.model.slot(parent)
            order = self.model.order
            order.insert(order.index(above) if above in order else len(order), slot)
        self.model.sweep(slot)

    @precondition(lambda self: self.being_filled())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.being_filled()))
        self.index.abort(slot)
        del self.model.rows[slot]

    @rule(key=keys)
    def read(self, key: BlockKey) -> None:
        slot = self.model.slot(key)
        self.pin(key)
        if slot is not None:
            self.unpin_slot(slot)

    @rule(key=keys)
    def pin(self, key: BlockKey) -> None:
        expected = self.model.slot(key)
        assert self.index.pin(key) == expected
        if expected is not None:
            self.model.rows[expected].pins += 1
            self.model.order = [slot for slot in self.model.order if slot != expected]

    @precondition(lambda self: self.being_read())
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        self.unpin_slot(data.draw(st.sampled_from(self.being_read())))

    def unpin_slot(self, slot: int) -> None:
        self.index.unpin(slot)
        row = self.model.rows[slot]
        row.pins -= 1
        if row.served and not row.pins:
            self.model.order.append(slot)
        self.model.sweep(slot)

    def renew(self, slot: int) -> None:
        if slot in self.model.order:
            self.model.order = [other for other in self.model.order if other != slot] + [slot]

    @rule(key=keys)
    def use(self, key: BlockKey) -> None:
        slots = [slot for slot, row in self.model.rows.items() if row.served and row.key == key]
        self.index.use_all([key])
        count = self.index.touches(key)
        if not slots:
            assert count == 0
            return
        row = self.model.rows[slots[0]]
        row.touches = min(row.touches + 1, 255)
        assert count == row.touches
        self.renew(slots[0])

    @rule(chain=chains)
    def touch(self, chain: list[BlockKey]) -> None:
        self.index.touch(chain)
        for key in reversed(chain):
            slot = self.model.slot(key)
            if slot is not None:
                self.renew(slot)

    @precondition(lambda self: len(self.model.order) > 1)
    @rule(data=st.data())
    def read_one_then_evict_one(self, data: st.DataObject) -> None:
        self.read(self.model.rows[data.draw(st.sampled_from(self.model.order))].key)
        self.evict(1)

    @rule(key=keys)
    def discard(self, key: BlockKey) -> None:
        self.index.discard(key)
        for slot in [slot for slot, row in self.model.rows.items() if row.key == key and row.served]:
            self.model.drop(slot)

    @rule(count=st.sampled_from([1, 0, 1, 2, 1, 5]))
    def evict(self, count: int) -> None:
        victims: list[BlockKey] = []
        for _ in range(count):
            victims += self.model.evict()
        assert self.index.evict(count) == len(victims)
        self.evicted += victims

    @rule()
    def take_evicted(self) -> None:
        assert self.index.take_evicted() == self.evicted
        self.evicted = []

    @rule()
    def take_erasures(self) -> None:
        taken = self.index.take_erasures()
        assert taken == self.model.erasures
        assert self.model.erases or not taken
        self.to_erase += taken
        self.model.erasures = []

    @precondition(lambda self: self.to_erase)
    @rule(data=st.data())
    def erased(self, data: st.DataObject) -> None:
        _, slot = self.to_erase.pop(data.draw(st.integers(0, len(self.to_erase) - 1)))
        self.index.erased(slot)
        del self.model.rows[slot]

    @rule(really=st.integers(0, 7))
    def clear(self, really: int) -> None:
        if really:
            return  # a tier that is always empty shows nothing
        self.index.clear()
        for slot in [slot for slot, row in self.model.rows.items() if row.served]:
            self.model.drop(slot)
        self.to_erase += self.index.take_erasures()
        self.model.erasures = []

    @rule(chain=chains)
    def lookup(self, chain: list[BlockKey]) -> None:
        assert [key in self.index for key in chain] == [self.model.slot(key) is not None for key in chain]

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "index"):
            return
        self.index.check()
        rows = self.model.rows
        for key in KEYS:
            assert self.index.is_known(key) == self.model.known(key)
            slot = self.model.slot(key)
            assert (key in self.index) == (slot is not None)
            assert self.index.slot_of(key) == slot
            assert self.index.touches(key) == sum(row.touches for row in rows.values() if row.served and row.key == key)
        for slot in range(self.model.capacity):
            assert self.index.state_of(slot) == (rows[slot].state if slot in rows else BlockState.ABSENT)
        assert set(self.index.readable_keys()) == {key for key in KEYS if self.model.slot(key) is not None}
        assert self.index.pinned_slots() == {slot: row.pins for slot, row in rows.items() if row.pins}
        stats = self.index.stats()
        assert stats.capacity_blocks == self.model.capacity
        assert stats.ready_blocks == len(self.slots_where(BlockState.READY, BlockState.LEASED))
        assert stats.filling_blocks == len(self.slots_where(BlockState.FILLING))
        assert stats.evicting_blocks == len(self.slots_where(BlockState.EVICTING))
        assert stats.quarantined_blocks == len(self.slots_where(BlockState.QUARANTINED))
        assert stats.pinned_blocks == len(self.being_read())


TestTierIndex = TierIndexMachine.TestCase
TestTierIndex.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
