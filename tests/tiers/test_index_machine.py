"""`TierIndex` against a model that keeps everything in plain lists and recomputes instead of remembering."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.tiers.index import TierIndex

KEYS = [BlockKey(bytes([number]) * 32) for number in range(5)]
keys = st.sampled_from(KEYS)
chains = st.lists(keys, max_size=5)


@dataclass
class Row:
    """One slot in use. `key` is None once it may no longer be served."""

    key: BlockKey | None
    ready: bool = False
    pins: int = 0


@dataclass
class Model:
    capacity: int
    rows: dict[int, Row] = field(default_factory=dict)
    #: Every key in order of last use, oldest first; only READY unpinned ones count.
    used: list[BlockKey] = field(default_factory=list)

    def slot(self, key: BlockKey) -> int | None:
        return next((slot for slot, row in self.rows.items() if row.key == key), None)

    def readable(self, key: BlockKey) -> bool:
        slot = self.slot(key)
        return slot is not None and self.rows[slot].ready

    def evictable(self) -> list[BlockKey]:
        free = {row.key for row in self.rows.values() if row.ready and not row.pins and row.key is not None}
        return [key for key in self.used if key in free]

    def use(self, key: BlockKey) -> None:
        self.used = [other for other in self.used if other != key] + [key]

    def drop(self, key: BlockKey) -> None:
        slot = self.slot(key)
        assert slot is not None
        self.rows[slot].key = None
        self.sweep(slot)

    def sweep(self, slot: int) -> None:
        row = self.rows[slot]
        if row.key is None and row.ready and not row.pins:
            del self.rows[slot]


class TierIndexMachine(RuleBasedStateMachine):
    @initialize(capacity=st.integers(1, 4))
    def start(self, capacity: int) -> None:
        self.index = TierIndex(capacity)
        self.model = Model(capacity)
        self.evicted: list[BlockKey] = []

    def slots_where(self, ready: bool, pinned: bool = False) -> list[int]:
        rows = self.model.rows.items()
        return sorted(slot for slot, row in rows if row.ready == ready and (row.pins > 0 or not pinned))

    @rule(key=keys)
    def reserve(self, key: BlockKey) -> None:
        known, order = self.model.slot(key) is not None, self.model.evictable()
        slot = self.index.reserve(key)
        if known or (len(self.model.rows) == self.model.capacity and not order):
            assert slot is None
            return
        if len(self.model.rows) == self.model.capacity:
            self.model.drop(order[0])
            self.evicted.append(order[0])
        assert slot is not None
        assert slot not in self.model.rows, "a slot in use was handed out"
        self.model.rows[slot] = Row(key)

    @rule(chain=st.permutations(KEYS))
    def fill(self, chain: list[BlockKey]) -> None:
        """What random single steps reach too seldom: a tier full of readable blocks."""
        for key in chain:
            before = set(self.model.rows)
            self.reserve(key)
            for slot in [slot for slot, row in self.model.rows.items() if not row.ready and slot not in before]:
                self.commit_slot(slot)

    @precondition(lambda self: self.slots_where(ready=False))
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        self.commit_slot(data.draw(st.sampled_from(self.slots_where(ready=False))))

    def commit_slot(self, slot: int) -> None:
        row = self.model.rows[slot]
        assert self.index.commit(slot) == (row.key is not None)
        row.ready = True
        if row.key is not None:
            self.model.use(row.key)
        self.model.sweep(slot)

    @precondition(lambda self: self.slots_where(ready=False))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.slots_where(ready=False)))
        self.index.abort(slot)
        del self.model.rows[slot]

    @rule(key=keys)
    def read(self, key: BlockKey) -> None:
        slot = self.model.slot(key)
        self.pin(key)
        if slot is not None and self.model.rows[slot].ready:
            self.unpin_slot(slot)

    @rule(key=keys)
    def pin(self, key: BlockKey) -> None:
        expected = self.model.slot(key) if self.model.readable(key) else None
        assert self.index.pin(key) == expected
        if expected is not None:
            self.model.rows[expected].pins += 1

    @precondition(lambda self: self.slots_where(ready=True, pinned=True))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        self.unpin_slot(data.draw(st.sampled_from(self.slots_where(ready=True, pinned=True))))

    def unpin_slot(self, slot: int) -> None:
        self.index.unpin(slot)
        row = self.model.rows[slot]
        row.pins -= 1
        if row.key is not None and not row.pins:
            self.model.use(row.key)
        self.model.sweep(slot)

    @rule(chain=chains)
    def touch(self, chain: list[BlockKey]) -> None:
        self.index.touch(chain)
        for key in reversed(chain):
            if key in self.model.evictable():
                self.model.use(key)

    @precondition(lambda self: len(self.model.evictable()) > 1)
    @rule(data=st.data())
    def read_one_then_evict_one(self, data: st.DataObject) -> None:
        self.read(data.draw(st.sampled_from(self.model.evictable())))
        self.evict(1)

    @rule(key=keys)
    def discard(self, key: BlockKey) -> None:
        self.index.discard(key)
        if self.model.slot(key) is not None:
            self.model.drop(key)

    @rule(count=st.sampled_from([1, 0, 1, 2, 1, 5]))
    def evict(self, count: int) -> None:
        victims = self.model.evictable()[:count]
        assert self.index.evict(count) == len(victims)
        for key in victims:
            self.model.drop(key)
        self.evicted += victims

    @rule()
    def take_evicted(self) -> None:
        assert self.index.take_evicted() == self.evicted
        self.evicted = []

    @rule(really=st.integers(0, 7))
    def clear(self, really: int) -> None:
        if really:
            return  # a tier that is always empty shows nothing
        self.index.clear()
        for key in KEYS:
            if self.model.slot(key) is not None:
                self.model.drop(key)

    @rule(chain=chains)
    def lookup(self, chain: list[BlockKey]) -> None:
        missing = [place for place, key in enumerate(chain) if not self.model.readable(key)]
        assert self.index.lookup(chain) == (missing[0] if missing else len(chain))

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "index"):
            return
        self.index.check()
        rows = self.model.rows
        for key in KEYS:
            slot = self.model.slot(key)
            assert self.index.is_known(key) == (slot is not None)
            assert (key in self.index) == self.model.readable(key)
            assert self.index.slot_of(key) == (slot if self.model.readable(key) else None)
        assert set(self.index.readable_keys()) == {key for key in KEYS if self.model.readable(key)}
        assert self.index.pinned_slots() == {slot: row.pins for slot, row in rows.items() if row.pins}
        stats = self.index.stats()
        assert stats.capacity_blocks == self.model.capacity
        assert stats.ready_blocks == sum(1 for row in rows.values() if row.ready and row.key is not None)
        assert stats.filling_blocks == sum(1 for row in rows.values() if not row.ready and row.key is not None)
        assert stats.quarantined_blocks == sum(1 for row in rows.values() if row.key is None)
        assert stats.pinned_blocks == sum(1 for row in rows.values() if row.pins)


TestTierIndex = TierIndexMachine.TestCase
TestTierIndex.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
