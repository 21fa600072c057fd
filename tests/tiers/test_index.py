"""What `TierIndex` refuses, and the orders that the state machine cannot name."""

from __future__ import annotations

import gc
import tracemalloc

import pytest

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.eviction import POLICIES, ArcPolicy
from dynamo_connectors.tiers.index import TierIndex

A, B, C, D = (BlockKey(letter.encode() * 32) for letter in "abcd")


def ready(index: TierIndex, *keys: BlockKey) -> None:
    for key in keys:
        slot = index.reserve(key)
        assert slot is not None
        assert index.commit(slot)


def test_a_tier_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one slot"):
        TierIndex(0)


def test_a_slot_that_is_not_being_filled_can_be_neither_committed_nor_aborted() -> None:
    index = TierIndex(2)
    ready(index, A)
    slot = index.slot_of(A)
    assert slot is not None
    for call in (index.commit, index.abort):
        with pytest.raises(AssertionError, match="expected FILLING"):
            call(slot)
        with pytest.raises(AssertionError, match="expected FILLING"):
            call(1 - slot)
    assert A in index


def test_unpinning_what_nobody_pinned_is_refused() -> None:
    index = TierIndex(1)
    ready(index, A)
    with pytest.raises(AssertionError, match="not pinned"):
        index.unpin(0)


def test_a_touched_chain_loses_its_tail_before_its_head() -> None:
    index = TierIndex(4)
    ready(index, A, B, C, D)
    index.touch([A, B, C])
    index.evict(3)
    assert index.take_evicted() == [D, C, B]


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_a_reset_while_filling_frees_the_slot_when_the_filler_reports(end: str) -> None:
    index = TierIndex(1)
    slot = index.reserve(A)
    assert slot is not None
    index.clear()
    assert index.reserve(B) is None, "the filler still writes there"
    if end == "commit":
        assert not index.commit(slot)
    else:
        index.abort(slot)
    assert A not in index
    assert index.reserve(B) == slot


def test_a_reset_while_read_frees_the_slot_after_the_last_reader() -> None:
    index = TierIndex(1)
    ready(index, A)
    slots = [index.pin(A), index.pin(A)]
    index.clear()
    assert index.pin(A) is None
    for slot in slots:
        assert slot is not None
        assert index.reserve(B) is None
        index.unpin(slot)
    assert index.reserve(B) is not None


def test_check_names_what_is_broken() -> None:
    index = TierIndex(2)
    ready(index, A)
    index._free.append(0)
    with pytest.raises(AssertionError, match="the free slots and the ABSENT ones differ"):
        index.check()
    index._free.pop()
    slot = index.slot_of(A)
    assert slot is not None
    index._order.remove(slot)
    with pytest.raises(AssertionError, match="eviction order and state disagree"):
        index.check()
    index._order.add(slot)
    index.check()


@pytest.mark.parametrize(("policy", "most_bytes"), [("lru", 220), ("arc", 220)])
def test_a_block_takes_little_memory(policy: str, most_bytes: int) -> None:
    """Keys included. The budget is 250 bytes at a million blocks, where the tables of a dict are fuller than here."""
    capacity = 50_000
    gc.collect()
    tracemalloc.start()
    try:
        index = TierIndex(capacity, POLICIES[policy](capacity))
        for number in range(capacity):
            slot = index.reserve(BlockKey(number.to_bytes(32, "big")))
            assert slot is not None
            index.commit(slot)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / capacity < most_bytes


def test_arc_remembers_as_many_keys_as_there_are_slots() -> None:
    index = TierIndex(100, ArcPolicy(100))
    for number in range(1000):
        key = BlockKey(number.to_bytes(32, "big"))
        slot = index.reserve(key)
        assert slot is not None
        index.commit(slot)
        if number % 3 == 0:
            index.use_all([key])
    index.check()


def test_a_full_tier_whose_store_erases_slowly_evicts_little_at_a_time() -> None:
    index = TierIndex(64, erases=True)
    ready(index, *[BlockKey(bytes([number]) * 32) for number in range(64)])
    assert index.evict(64) == 1, "one is on its way out already, and two may be"
    assert index.reserve(BlockKey(b"x" * 32)) is None
    assert index.stats().evicting_blocks == 2
    (first, second) = index.take_erasures()
    index.erased(first[1])
    assert index.reserve(second[0]) is None, "its object would be erased under it"
    assert index.reserve(BlockKey(b"x" * 32)) == first[1]


def test_a_released_place_is_restored_only_before_it_was_used() -> None:
    index = TierIndex(3)
    assert index.restore(1, A)
    assert not index.restore(1, B)
    assert not index.restore(2, A)
    assert not index.restore(3, B)
    assert not index.restore(-1, B)
    index.discard(A)
    ready(index, B, C, D)
    assert sorted(map(index.slot_of, (B, C, D)), key=str) == [0, 1, 2]
    index.discard(C)
    slot = next(slot for slot in range(3) if index.state_of(slot).name == "ABSENT")
    assert not index.restore(slot, A), "a slot that has seen traffic"
