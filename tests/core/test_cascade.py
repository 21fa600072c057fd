"""Named cases of the copies between tiers: who is admitted, what chunks are, what a late or failed copy leaves."""

from __future__ import annotations

import pytest

from dynamo_connectors.block_manager import BlockManager, Change, Erasure, Move, NamedTier
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.cascade import jobs_of
from dynamo_connectors.tier_stack import Place
from dynamo_connectors.tiers.index import TierIndex

DRAM, DISK, STORE = "host_dram", "nvme_ssd", "object_store"
CHAIN = [BlockKey(bytes([number]) * 32) for number in range(8)]


def with_disk(dram: int = 8, disk: int = 8, **min_touches: int) -> BlockManager:
    return BlockManager([NamedTier(DRAM, TierIndex(dram)), NamedTier(DISK, TierIndex(disk))], min_touches)


def with_store(chunk_blocks: int = 3, chunks: int = 4, dram: int = 16, **min_touches: int) -> BlockManager:
    store = NamedTier(STORE, TierIndex(chunks, erases=True), chunk_blocks)
    return BlockManager([NamedTier(DRAM, TierIndex(dram)), store], min_touches)


def store(manager: BlockManager, chain: list[BlockKey], parent: BlockKey | None = None) -> None:
    for target in manager.reserve(chain, parent):
        manager.commit(target)


def finish(manager: BlockManager) -> list[Move]:
    done: list[Move] = []
    while moves := manager.take_moves():
        for move in moves:
            manager.end_move(move, ok=True)
        done += moves
    return done


def request(manager: BlockManager, chain: list[BlockKey]) -> None:
    manager.note_use(chain)
    store(manager, chain)


def forget_dram(manager: BlockManager) -> None:
    manager.tiers[0].index.evict(100)
    manager.tiers[0].index.take_evicted()


def in_tier(manager: BlockManager, tier: str) -> list[BlockKey]:
    index = next(named.index for named in manager.tiers if named.name == tier)
    return [key for key in CHAIN if key in index]


# -- admission ------------------------------------------------------------------------------------------------------
def test_a_block_goes_to_disk_when_the_second_request_wants_it_and_not_before() -> None:
    manager = with_disk(nvme_ssd=2)
    request(manager, CHAIN[:3])
    assert not manager.has_moves_waiting
    request(manager, CHAIN[:2])
    assert [(move.key, move.source_tier, move.target_tier) for move in finish(manager)] == [
        (key, DRAM, DISK) for key in CHAIN[:2]
    ]
    request(manager, CHAIN[:2])
    assert not manager.has_moves_waiting, "what is on disk is not written again"


def test_a_second_request_while_the_first_still_fills_counts() -> None:
    manager = with_disk(nvme_ssd=2)
    manager.note_use(CHAIN[:1])
    (target,) = manager.reserve(CHAIN[:1])
    manager.note_use(CHAIN[:1])
    assert not manager.has_moves_waiting
    manager.commit(target)
    assert [move.key for move in manager.take_moves()] == CHAIN[:1]


def test_host_memory_can_wait_for_the_second_request_too() -> None:
    manager = with_disk(host_dram=2, nvme_ssd=2)
    request(manager, CHAIN[:3])
    assert manager.match(CHAIN) == 0
    assert manager.dropped == {"not_admitted": 3}
    manager.note_use(CHAIN[:2])
    assert [target.key for target in manager.reserve(CHAIN[:3])] == CHAIN[:2]
    assert manager.dropped == {"not_admitted": 4}


def test_a_count_goes_along_with_the_block_when_it_comes_back_up() -> None:
    manager = with_disk(nvme_ssd=2)
    request(manager, CHAIN[:1])
    request(manager, CHAIN[:1])
    finish(manager)
    forget_dram(manager)
    manager.note_use(CHAIN[:1])
    store(manager, CHAIN[:1])
    assert manager.tiers[0].index.touches(CHAIN[0]) == 3


def test_a_chain_that_is_offered_goes_down_as_far_as_it_was_used() -> None:
    manager = with_disk(dram=32, nvme_ssd=3)
    request(manager, CHAIN)
    manager.note_use(CHAIN[:4])
    manager.note_use(CHAIN[:2])
    manager.offload(CHAIN)
    assert [move.key for move in finish(manager)] == CHAIN[:2]


def test_a_chunk_goes_down_when_its_least_used_block_may() -> None:
    manager = with_store(dram=32, object_store=2)
    request(manager, CHAIN[:6])
    manager.note_use(CHAIN[:5])
    manager.offload(CHAIN[:6])
    assert [move.key for move in finish(manager)] == CHAIN[:3]
    index = manager.tiers[0].index
    index.use_all([CHAIN[5]])
    index.discard(CHAIN[4])
    manager.offload(CHAIN[:6])
    assert not manager.has_moves_waiting, "a block of the chunk is gone"


# -- chunks ---------------------------------------------------------------------------------------------------------
def test_a_chunk_goes_down_in_one_job_named_by_its_last_block() -> None:
    manager = with_store(dram=32, object_store=2)
    request(manager, CHAIN)
    assert not manager.has_moves_waiting
    manager.note_use(CHAIN[:7])
    first, second = jobs_of(manager.take_moves())
    assert [(move.key, move.chunk, move.row) for move in first] == [(CHAIN[i], CHAIN[2], i) for i in range(3)]
    assert [(move.key, move.chunk, move.row) for move in second] == [(CHAIN[i + 3], CHAIN[5], i) for i in range(3)]
    assert {move.target_slot for move in first} != {move.target_slot for move in second}
    for move in first[:2]:
        manager.end_move(move, ok=True)
        assert in_tier(manager, STORE) == [], "a chunk can be read before it is complete"
    manager.end_move(first[2], ok=True)
    assert in_tier(manager, STORE) == [CHAIN[2]]


def test_a_slow_tier_does_not_hold_up_a_fast_one() -> None:
    lower = [NamedTier(DISK, TierIndex(16)), NamedTier(STORE, TierIndex(16, erases=True), 2)]
    manager = BlockManager([NamedTier(DRAM, TierIndex(16)), *lower])
    store(manager, CHAIN)
    manager.offload(CHAIN)
    started = manager.take_moves()
    assert {move.target_tier for move in started} == {DISK, STORE}
    while on_disk := [move for move in started if move.target_tier == DISK]:
        for move in on_disk:
            manager.end_move(move, ok=True)
        started = manager.take_moves()
    manager.check()
    assert in_tier(manager, DISK) == CHAIN, "the disk waits for the object store"
    assert manager.moves_in_flight == 4, "a quarter of the first tier is on its way to the object store"


@pytest.mark.parametrize("bad_row", [0, 1, 2])
def test_a_chunk_with_one_bad_row_is_no_chunk(bad_row: int) -> None:
    manager = with_store()
    request(manager, CHAIN[:3])
    manager.offload(CHAIN[:3])
    moves = manager.take_moves()
    for move in moves:
        manager.end_move(move, ok=move.row != bad_row)
        manager.check()
    assert in_tier(manager, STORE) == []
    assert manager.dropped == {"move_failed": 3}
    assert manager.stats()[STORE].filling_blocks == 0


def test_blocks_that_were_filled_late_go_down_when_the_request_ends() -> None:
    manager = with_store()
    manager.note_use(CHAIN[:3])
    targets = manager.reserve(CHAIN[:3])
    manager.offload(CHAIN[:3])
    assert not manager.has_moves_waiting
    for target in targets:
        manager.commit(target)
    manager.offload(CHAIN[:3])
    assert len(manager.take_moves()) == 3


def test_a_chain_is_read_on_from_chunks_by_rows() -> None:
    manager = with_store(chunk_blocks=3)
    request(manager, CHAIN[:7])
    manager.offload(CHAIN[:7])
    finish(manager)
    forget_dram(manager)
    store(manager, CHAIN[:2])
    assert manager.match(CHAIN) == 6
    assert manager.match(CHAIN, start=4) == 2
    assert manager.match(CHAIN[:5]) == 3, "a chain that ends inside a chunk has no name for it"
    sources = manager.lease(CHAIN, start=1)
    assert [(source.tier, source.chunk, source.row) for source in sources] == [
        (DRAM, None, 0),
        (STORE, CHAIN[2], 2),
        (STORE, CHAIN[5], 0),
        (STORE, CHAIN[5], 1),
        (STORE, CHAIN[5], 2),
    ]
    manager.release(sources, damaged={CHAIN[4]})
    assert manager.match(CHAIN) == 3, "the damaged chunk is still served"


def test_the_changes_of_chunks_that_share_blocks_tell_what_can_be_read() -> None:
    manager = with_store(chunk_blocks=2)
    other = [CHAIN[0], CHAIN[7]]
    for chain in (CHAIN[:2], other):
        request(manager, chain)
        manager.offload(chain)
    finish(manager)
    manager.take_changes()
    leased = manager.lease(other)
    manager.release(leased)
    forget_dram(manager)
    sources = manager.lease(other)
    manager.release(sources, damaged={CHAIN[0]})
    assert manager.take_changes() == [Change("removed", STORE, CHAIN[7])]


def test_an_evicted_object_keeps_its_place_until_it_is_erased() -> None:
    manager = with_store(chunk_blocks=1, chunks=2)
    for key in CHAIN[:2]:
        request(manager, [key])
        finish(manager)
    assert manager.take_erasures() == [Erasure(STORE, CHAIN[0], 0)], "the full tier makes room ahead"
    assert manager.stats()[STORE].evicting_blocks == 1
    request(manager, CHAIN[2:3])
    assert finish(manager) == []
    assert manager.dropped == {"tier_busy": 1}
    manager.offload(CHAIN[:1])
    assert finish(manager) == [], "an object that is being erased must not be written meanwhile"
    manager.end_erasure(Erasure(STORE, CHAIN[0], 0))
    manager.offload(CHAIN[2:3])
    assert [move.key for move in finish(manager)] == [CHAIN[2]]


def test_the_first_tier_takes_single_blocks() -> None:
    with pytest.raises(ValueError, match="takes single blocks"):
        BlockManager([NamedTier(DRAM, TierIndex(2), 2)])
    with pytest.raises(ValueError, match="one name"):
        BlockManager([NamedTier(DRAM, TierIndex(2)), NamedTier(DRAM, TierIndex(2))])


def test_a_place_is_the_row_of_an_aligned_chunk() -> None:
    tier = NamedTier(STORE, TierIndex(2), 3)
    places = [tier.place_of(CHAIN, position) for position in range(8)]
    chunks = [Place(CHAIN[2], row) for row in range(3)] + [Place(CHAIN[5], row) for row in range(3)]
    assert places == [*chunks, None, None]


# -- prefetch -------------------------------------------------------------------------------------------------------
def test_a_prefetch_brings_a_chain_up_and_leaves_its_sources() -> None:
    manager = with_disk()
    request(manager, CHAIN[:4])
    finish(manager)
    forget_dram(manager)
    assert manager.prefetch(CHAIN) == 4
    assert manager.prefetch(CHAIN) == 4, "asking twice queues once"
    moves = finish(manager)
    assert [(move.key, move.source_tier, move.target_tier) for move in moves] == [(k, DISK, DRAM) for k in CHAIN[:4]]
    assert in_tier(manager, DRAM) == in_tier(manager, DISK) == CHAIN[:4]
    assert manager.prefetch(CHAIN) == 0


def test_a_prefetch_from_chunks_names_chunk_and_row() -> None:
    manager = with_store(chunk_blocks=2)
    request(manager, CHAIN[:4])
    manager.offload(CHAIN[:4])
    finish(manager)
    forget_dram(manager)
    assert manager.prefetch(CHAIN[:4]) == 4
    first, second = jobs_of(manager.take_moves())
    assert [(move.key, move.chunk, move.row) for move in first] == [(CHAIN[0], CHAIN[1], 0), (CHAIN[1], CHAIN[1], 1)]
    manager.end_move(first[0], ok=True)
    manager.end_move(first[1], ok=False, damaged=True)
    for move in second:
        manager.end_move(move, ok=True)
    assert in_tier(manager, DRAM) == [CHAIN[0], CHAIN[2], CHAIN[3]]
    assert in_tier(manager, STORE) == [CHAIN[3]]
    assert manager.dropped == {"damaged": 1, "move_failed": 1}


def test_the_copies_that_a_request_waits_for_start_first() -> None:
    manager = with_disk(dram=4)
    request(manager, CHAIN[:1])
    finish(manager)
    forget_dram(manager)
    request(manager, CHAIN[4:6])
    manager.prefetch(CHAIN[:1])
    assert [(move.key, move.target_tier) for move in manager.take_moves()] == [(CHAIN[0], DRAM), (CHAIN[4], DISK)]


# -- the head of a chain outlives its tail --------------------------------------------------------------------------
def evicted_one_by_one(manager: BlockManager, tier: str) -> list[BlockKey]:
    index = next(named.index for named in manager.tiers if named.name == tier)
    index.evict(100)
    return index.take_evicted()


def test_of_a_chain_that_was_just_stored_the_tail_goes_first() -> None:
    manager = with_disk()
    store(manager, CHAIN[:2])
    store(manager, CHAIN[2:4], parent=CHAIN[1])
    assert evicted_one_by_one(manager, DRAM) == CHAIN[3::-1]


def test_of_a_chain_that_went_down_and_came_up_the_tail_goes_first() -> None:
    manager = with_disk(dram=32)
    request(manager, CHAIN)
    finish(manager)
    forget_dram(manager)
    manager.prefetch(CHAIN)
    finish(manager)
    assert evicted_one_by_one(manager, DRAM) == CHAIN[::-1]
    assert evicted_one_by_one(manager, DISK) == CHAIN[::-1]


def test_of_a_chain_of_chunks_that_was_read_the_tail_goes_first() -> None:
    manager = with_store(chunk_blocks=2, dram=32)
    request(manager, CHAIN)
    manager.offload(CHAIN)
    finish(manager)
    assert not manager.take_erasures()
    forget_dram(manager)
    manager.prefetch(CHAIN)
    finish(manager)
    request(manager, CHAIN[:1])
    other = [BlockKey(bytes([90 + number]) * 32) for number in range(2)]
    request(manager, other)
    manager.offload(other)
    finish(manager)
    assert [erasure.key for erasure in manager.take_erasures()] == [CHAIN[7]]


def test_of_a_chain_whose_pins_have_ended_the_tail_goes_first() -> None:
    manager = with_disk(dram=16)
    store(manager, CHAIN)
    manager.pin(CHAIN, until=1.0)
    manager.pin(CHAIN, until=2.0)
    manager.expire_pins(1.0)
    manager.expire_pins(2.0)
    assert evicted_one_by_one(manager, DRAM) == CHAIN[::-1]


def test_of_a_restored_chain_the_tail_goes_first_once_it_was_used() -> None:
    manager = with_disk()
    assert manager.restore(DISK, enumerate(CHAIN)) == 8
    manager.note_use(CHAIN)
    assert evicted_one_by_one(manager, DISK) == CHAIN[::-1]


def test_of_a_released_chain_the_tail_goes_first() -> None:
    manager = with_disk()
    store(manager, CHAIN)
    manager.release(manager.lease(CHAIN[:3]))
    assert evicted_one_by_one(manager, DRAM)[-3:] == CHAIN[2::-1]


# -- warm restart ---------------------------------------------------------------------------------------------------
def test_what_was_restored_is_served_announced_and_counts_as_admitted() -> None:
    manager = with_disk(nvme_ssd=3)
    assert manager.restore(DISK, [(5, CHAIN[0]), (2, CHAIN[1]), (2, CHAIN[2]), (9, CHAIN[3]), (1, CHAIN[1])]) == 2
    assert manager.take_changes() == [Change("stored", DISK, CHAIN[0]), Change("stored", DISK, CHAIN[1])]
    assert [source.slot for source in manager.lease(CHAIN)] == [5, 2]
    assert manager.tiers[1].index.touches(CHAIN[0]) == 3
    manager.check()
    manager.release(manager.lease(CHAIN[:1]) * 2)
    manager.release(manager.lease(CHAIN[1:2]) * 2)
