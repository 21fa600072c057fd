"""The orders of eviction, against lists and against ARC as it stands in the paper."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.eviction import POLICIES, ArcPolicy, EvictionPolicy, LruPolicy
from dynamo_connectors.tiers.index import TierIndex

SLOTS = 5
slots = st.integers(0, SLOTS - 1)
calls = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["add", "remove", "use_all"]), slots),
        st.tuples(st.just("add_below"), slots, slots),
    ),
    max_size=40,
)


@given(calls=calls)
def test_lru_agrees_with_a_list(calls: list[tuple[str, int] | tuple[str, int, int]]) -> None:
    policy, order = LruPolicy(SLOTS), list[int]()
    for name, slot, *below in calls:
        if name == "add_below":
            if slot in order or below[0] not in order:
                continue
            order.insert(order.index(below[0]), slot)
        elif name != "use_all" or slot in order:
            order = [other for other in order if other != slot] + [slot] * (name != "remove")
        getattr(policy, name)(*([[slot]] if name == "use_all" else [slot, *below]))
        assert policy.victim() == (order[0] if order else None)
        assert policy.victim() == (order[0] if order else None), "asking changed the order"
        assert len(policy) == len(order)
        assert [slot in policy for slot in range(SLOTS)] == [slot in order for slot in range(SLOTS)]
        policy.check()


class PaperArc:
    """Figure 4 of Megiddo & Modha, "ARC", FAST 2003, line by line, with whole numbers for the target. Oldest first."""

    def __init__(self, capacity: int) -> None:
        self.c, self.p = capacity, 0
        self.t1: list[int] = []
        self.t2: list[int] = []
        self.b1: list[int] = []
        self.b2: list[int] = []

    def request(self, x: int) -> bool:
        t1, t2, b1, b2, c = self.t1, self.t2, self.b1, self.b2, self.c
        if x in t1 or x in t2:
            (t1 if x in t1 else t2).remove(x)
            t2.append(x)
            return True
        if x in b1:
            self.p = min(c, self.p + max(len(b2) // len(b1), 1))
            self.replace(x)
            b1.remove(x)
            t2.append(x)
            return False
        if x in b2:
            self.p = max(0, self.p - max(len(b1) // len(b2), 1))
            self.replace(x)
            b2.remove(x)
            t2.append(x)
            return False
        if len(t1) + len(b1) == c:
            if len(t1) < c:
                b1.pop(0)
                self.replace(x)
            else:
                t1.pop(0)
        elif len(t1) + len(t2) + len(b1) + len(b2) >= c:
            if len(t1) + len(t2) + len(b1) + len(b2) == 2 * c:
                b2.pop(0)
            self.replace(x)
        t1.append(x)
        return False

    def replace(self, x: int) -> None:
        if self.t1 and ((x in self.b2 and len(self.t1) == self.p) or len(self.t1) > self.p):
            self.b1.append(self.t1.pop(0))
        else:
            self.b2.append(self.t2.pop(0))


def key_of(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(4, "big"))


@given(capacity=st.integers(1, 6), requests=st.lists(st.one_of(st.integers(0, 4), st.integers(0, 14)), max_size=150))
def test_arc_agrees_with_the_paper(capacity: int, requests: list[int]) -> None:
    paper, index = PaperArc(capacity), TierIndex(capacity, ArcPolicy(capacity))
    for number in requests:
        key = key_of(number)
        index.use_all([key])
        hit = index.touches(key) > 0
        assert hit == paper.request(number)
        if not hit:
            slot = index.reserve(key)
            assert slot is not None
            assert index.commit(slot)
        assert set(index.readable_keys()) == {key_of(number) for number in paper.t1 + paper.t2}
        index.check()


def test_arc_keeps_what_was_used_twice_through_a_flood_of_blocks_used_once() -> None:
    survivors = {}
    for name, policy in POLICIES.items():
        index = TierIndex(4, policy(4))
        for number in (0, 1):
            slot = index.reserve(key_of(number))
            assert slot is not None
            index.commit(slot)
        index.use_all([key_of(0)])
        for number in range(10, 20):
            slot = index.reserve(key_of(number))
            assert slot is not None
            index.commit(slot)
        survivors[name] = key_of(0) in index
    assert survivors == {"lru": False, "arc": True}


def test_being_read_and_being_put_in_order_are_no_uses() -> None:
    index = TierIndex(3, ArcPolicy(3))
    for number in range(3):
        slot = index.reserve(key_of(number))
        assert slot is not None
        index.commit(slot)
    slot = index.pin(key_of(0))
    assert slot is not None
    index.use_all([key_of(1)])
    index.unpin(slot)
    index.touch([key_of(0)])
    index.evict(2)
    assert index.readable_keys() == [key_of(1)], "ARC took a read for a second use"


@pytest.mark.parametrize("policy", POLICIES.values())
@given(data=st.data())
def test_pins_stay_out_of_the_order_and_ghosts_stay_few(policy: type[EvictionPolicy], data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, 4))
    index = TierIndex(capacity, policy(capacity))
    pinned: list[int] = []
    for number in data.draw(st.lists(st.integers(0, 9), max_size=60)):
        key = key_of(number)
        action = data.draw(st.sampled_from(["store", "store", "pin", "unpin", "use", "discard"]))
        if action == "store" and (slot := index.reserve(key)) is not None:
            index.commit(slot)
        elif action == "pin" and (slot := index.pin(key)) is not None:
            pinned.append(slot)
        elif action == "unpin" and pinned:
            index.unpin(pinned.pop())
        elif action == "use":
            index.use_all([key])
        elif action == "discard":
            index.discard(key)
        index.check()
    for slot in pinned:
        index.unpin(slot)
    index.evict(capacity)
    assert not index.readable_keys()
