"""The object tier's index: which blocks of a chain make a chunk, and which runs can be read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.tiers.chunks import Chunk, ChunkRow, ChunkTier, capacity_chunks_for, chunk_blocks_for


def chain(length: int, family: int = 0) -> list[BlockKey]:
    return [BlockKey(bytes([family, number])) for number in range(length)]


def store(tier: ChunkTier, chunk: BlockKey) -> int:
    slot = tier.reserve(chunk)
    assert slot is not None
    assert tier.commit(slot)
    return slot


@pytest.mark.parametrize(
    ("row_bytes", "blocks"),
    [
        (1, 32),
        (64 << 10, 32),
        (256 << 10, 32),
        (500_000, 32),
        (512 << 10, 16),
        (2 << 20, 4),
        (9 << 20, 1),
        (1 << 30, 1),
    ],
)
def test_objects_are_8_to_16_mib_where_rows_allow_it(row_bytes: int, blocks: int) -> None:
    assert chunk_blocks_for(row_bytes) == blocks
    assert chunk_blocks_for(row_bytes) * row_bytes < max(16 << 20, row_bytes + 1)


def test_a_share_too_small_for_one_object_names_the_flag() -> None:
    assert capacity_chunks_for(100, 30) == 3
    with pytest.raises(ConfigError, match="--kvbm-object-gb"):
        capacity_chunks_for(29, 30)


def test_a_chunk_is_named_after_its_last_block_and_aligned() -> None:
    tier, keys = ChunkTier(4, 4), chain(11)
    assert list(tier.whole_chunks(keys)) == [Chunk(keys[3], 0), Chunk(keys[7], 4)]
    assert list(tier.whole_chunks(keys, 5)) == [Chunk(keys[7], 4)], "the one that a load may begin inside of"
    assert list(tier.whole_chunks(keys[:3])) == []
    assert tier.row_of(keys, 0) == ChunkRow(keys[3], 0)
    assert tier.row_of(keys, 6) == ChunkRow(keys[7], 2)
    assert [tier.row_of(keys, position) for position in (8, 9, 10)] == [None] * 3, "the tail is in no chunk"


def test_a_run_ends_at_the_first_chunk_that_is_not_here() -> None:
    tier, keys = ChunkTier(4, 4), chain(19)
    store(tier, keys[3])
    store(tier, keys[7])
    store(tier, keys[15])
    assert [tier.lookup(keys, start) for start in (0, 1, 3, 4, 7, 8, 11, 12, 14, 16, 18)] == [
        *(8, 7, 5, 4, 1, 0, 0, 4, 2, 0, 0),
    ]
    assert tier.lookup(keys[:7]) == 4, "the shorter chain does not know the second chunk's name"


def test_a_chunk_on_its_way_is_known_and_not_readable() -> None:
    tier, keys = ChunkTier(2, 2), chain(2)
    slot = tier.reserve(keys[1])
    assert slot is not None
    assert tier.is_known(keys[1])
    assert keys[1] not in tier
    assert tier.reserve(keys[1]) is None
    assert tier.lookup(keys) == 0
    tier.discard(keys[1])
    assert not tier.commit(slot), "dropped meanwhile: the object is to be deleted"
    assert tier.stats().doomed_blocks == 0


def test_chunks_evicted_to_make_room_are_named_once() -> None:
    tier, keys = ChunkTier(2, 2), chain(6)
    for chunk in tier.whole_chunks(keys):
        store(tier, chunk.key)
    assert tier.take_evicted() == [keys[1]]
    assert tier.take_evicted() == []
    assert tier.stats().evicted_blocks_total == 2


def test_a_pinned_chunk_stays_and_a_touched_head_outlives_its_tail() -> None:
    tier, keys = ChunkTier(2, 2), chain(4)
    store(tier, keys[1])
    store(tier, keys[3])
    tier.touch(keys)
    assert tier.evict(1) == 1
    assert tier.take_evicted() == [keys[3]], "the tail goes first"
    slots = [tier.pin(keys[1]), tier.pin(keys[1])]
    assert slots[0] == slots[1] == tier.slot_of(keys[1])
    assert tier.evict(1) == 0
    for slot in slots:
        assert slot is not None
        tier.unpin(slot)
    assert tier.pinned_slots() == {}
    assert tier.evict(1) == 1
    assert tier.pin(keys[1]) is None


def test_what_the_store_holds_is_taken_in_without_evicting() -> None:
    tier, keys = ChunkTier(3, 2), chain(8)
    store(tier, keys[1])
    assert not tier.restore(keys[1]), "known already"
    slot = tier.reserve(keys[3])
    assert tier.restore(keys[5])
    assert not tier.restore(keys[7]), "full"
    assert tier.readable_chunks() == [keys[1], keys[5]]
    assert tier.stats().evicted_blocks_total == 0
    assert slot is not None
    tier.abort(slot)
    assert tier.restore(keys[7])


def test_a_doomed_chunk_still_holds_its_place() -> None:
    tier, keys = ChunkTier(1, 2), chain(4)
    store(tier, keys[1])
    slot = tier.pin(keys[1])
    tier.clear()
    assert tier.stats().doomed_blocks == 2
    assert not tier.restore(keys[3])
    assert slot is not None
    tier.unpin(slot)
    assert tier.restore(keys[3])


@given(
    size=st.integers(1, 5),
    length=st.integers(0, 24),
    start=st.integers(0, 26),
    here=st.sets(st.integers(0, 23)),
)
def test_lookup_agrees_with_asking_block_by_block(size: int, length: int, start: int, here: set[int]) -> None:
    tier, keys = ChunkTier(24, size), chain(length)
    for position in here:
        if position < length:
            tier.restore(keys[position])  # as a chunk's name: only those at an aligned end can ever matter
    run = 0
    while start + run < length:
        place = tier.row_of(keys, start + run)
        if place is None or place.chunk not in tier:
            break
        assert keys[start + run - place.row + size - 1] == place.chunk
        run += 1
    assert tier.lookup(keys, start) == run
    tier.check()


def test_a_chunk_of_no_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        ChunkTier(1, 0)
