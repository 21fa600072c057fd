"""Calls for whole chains do what the calls for single blocks do, in the same order: only faster."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_connectors.block_manager import BlockManager, NamedTier
from dynamo_connectors.blocks import BlockKey, records
from dynamo_connectors.cascade import Move
from dynamo_connectors.eviction import ArcPolicy, EvictionPolicy, LruPolicy
from dynamo_connectors.tiers.index import TierIndex

CAPACITY = 8
KEYS = [BlockKey(b"key-%d" % number) for number in range(12)]
#: What can be done with a list of blocks: one call for all on one index, single calls on the other.
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["fill", "pin", "unpin", "use", "touch", "discard", "evict"]),
        st.lists(st.sampled_from(KEYS), max_size=6, unique=True),
    ),
    max_size=25,
)


def both(index: TierIndex, single: TierIndex, step: str, keys: list[BlockKey]) -> None:
    if step == "fill":
        for each in (index, single):
            for key in keys:
                slot = each.reserve(key)
                if slot is not None:
                    each.commit(slot)
    elif step == "pin":
        readable = [key for key in keys if key in index]
        assert index.pin_all(readable) == [single.pin(key) for key in readable]
    elif step == "unpin":
        slots = list(index.pinned_slots())[: len(keys)]
        index.unpin_all(slots)
        for slot in slots:
            single.unpin(slot)
    elif step == "use":
        index.use_all(keys)
        for key in keys:
            single.use_all([key])
    elif step == "touch":
        index.touch(keys)
        for key in reversed(keys):
            single.touch([key])
    elif step == "discard":
        for each in (index, single):
            for key in keys[:1]:
                each.discard(key)
    else:
        assert index.evict(len(keys)) == single.evict(len(keys))


def order(index: TierIndex) -> list[BlockKey]:
    """What would go, oldest first. Uses the index up."""
    index.take_evicted()
    index.evict(CAPACITY)
    return index.take_evicted()


@pytest.mark.parametrize("policy", [LruPolicy, ArcPolicy])
@settings(max_examples=150, deadline=None)
@given(steps=STEPS)
def test_one_call_for_a_chain_equals_one_for_each_block(policy: Callable[[int], EvictionPolicy], steps: object) -> None:
    index, single = (TierIndex(CAPACITY, policy(CAPACITY)) for _ in range(2))
    for step, keys in steps:  # type: ignore[attr-defined]
        both(index, single, step, keys)
        index.check()
        assert index.readable == single.readable
        assert index.pinned_slots() == single.pinned_slots()
        assert [index.touches(key) for key in KEYS] == [single.touches(key) for key in KEYS]
    for slot, pins in list(index.pinned_slots().items()):
        for _ in range(pins):
            index.unpin_all([slot])
            single.unpin(slot)
    assert order(index) == order(single)


def test_a_chain_with_a_block_that_is_not_pinned_is_refused() -> None:
    index = TierIndex(2)
    with pytest.raises(AssertionError, match="not pinned"):
        index.unpin_all([0])


@given(data=st.data())
def test_runs_say_of_every_block_what_find_says(data: st.DataObject) -> None:
    tiers = [
        NamedTier("one", TierIndex(8)),
        NamedTier("two", TierIndex(8)),
        NamedTier("objects", TierIndex(4), chunk_blocks=2),
        NamedTier("last", TierIndex(8)),
    ]
    manager = BlockManager(tiers)
    chain = KEYS[:8]
    for tier in tiers:
        for at in data.draw(st.sets(st.integers(0, 7))):
            name = chain[at] if tier.chunk_blocks == 1 else chain[at - at % 2 + 1]
            slot = manager._stack.reserve(tier, name, 1)
            if slot is not None:
                blocks = (name,) if tier.chunk_blocks == 1 else tuple(chain[at - at % 2 : at - at % 2 + 2])
                manager._stack.commit(tier, slot, blocks, None)
    start, end = data.draw(st.integers(0, 8)), data.draw(st.integers(0, 8))
    wanted = []
    for at in range(start, end):
        found = manager._stack.find(chain, at)
        if found is None:
            break
        wanted.append(found[0].name)
    assert manager.tiers_of(chain, start, end) == wanted
    leased = manager.lease(chain, start, max(0, end - start))
    assert [source.tier for source in leased] == wanted
    manager.check()
    manager.release(leased)
    manager.check()


class CountedKey(bytes):
    """Knows how often any of its kind was looked up."""

    looked_up = 0

    def __hash__(self) -> int:
        CountedKey.looked_up += 1
        return super().__hash__()


@pytest.mark.parametrize("gap", [1, 2, 3, 16, 10_000])
def test_a_chain_that_alternates_between_tiers_is_looked_up_in_linear_time(gap: int) -> None:
    blocks = 4000
    tiers = [NamedTier("fast", TierIndex(blocks)), NamedTier("slow", TierIndex(blocks))]
    manager = BlockManager(tiers)
    chain = [BlockKey(CountedKey(b"%d" % number)) for number in range(blocks)]
    for number, key in enumerate(chain):
        for tier in tiers if number % gap == gap - 1 else tiers[1:]:
            slot = tier.index.reserve(key)
            assert slot is not None
            tier.index.commit(slot)
    CountedKey.looked_up = 0
    assert len(manager.tiers_of(chain, 0, blocks)) == blocks
    assert CountedKey.looked_up <= 24 * blocks


def test_records_are_the_named_tuples_they_stand_for() -> None:
    names = ["a", "b"]
    fields = (names, "xy", "yx", (1, 2), (3, 4), (None, None), (0, 0))
    keys = [BlockKey(name.encode()) for name in names]
    made = records(Move, keys, *fields[1:])
    assert made == [Move(keys[0], "x", "y", 1, 3, None, 0), Move(keys[1], "y", "x", 2, 4, None, 0)]
    assert all(type(each) is Move for each in made)
    assert made[0].chunk is None
