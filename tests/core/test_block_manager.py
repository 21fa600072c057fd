"""Named cases of `BlockManager`: refusals, reasons and races. The state machine next door covers the rest."""

from __future__ import annotations

import pytest

from dynamo_connectors import cascade
from dynamo_connectors.block_manager import BlockManager, Move, NamedTier
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.cascade import MAX_MOVES
from dynamo_connectors.tiers.index import TierIndex

A, B, C, D = (BlockKey(letter.encode() * 32) for letter in "abcd")


def manager_of(*capacities: int) -> BlockManager:
    return BlockManager([NamedTier(f"tier{place}", TierIndex(count)) for place, count in enumerate(capacities)])


def store(manager: BlockManager, *keys: BlockKey) -> None:
    for target in manager.reserve(keys):
        manager.commit(target)


def move_all(manager: BlockManager) -> list[Move]:
    moves = manager.take_moves()
    for move in moves:
        manager.end_move(move, ok=True)
    return moves


def test_a_key_named_twice_is_reserved_once() -> None:
    manager = manager_of(4)
    targets = manager.reserve([A, A, B])
    assert [target.key for target in targets] == [A, B]
    assert not manager.dropped


def test_bytes_found_damaged_while_they_sink_are_not_kept_below() -> None:
    manager = manager_of(2, 2)
    store(manager, A)
    (move,) = manager.take_moves()
    sources = manager.lease([A])
    manager.release(sources, damaged={A})
    manager.end_move(move, ok=True)
    assert manager.match([A]) == 0, "the copy of the damaged bytes is served"
    assert manager.dropped == {"damaged": 1, "source_gone": 1}
    assert [change.kind for change in manager.take_changes()] == ["stored", "removed"]
    assert manager.stats()["tier1"].quarantined_blocks == 0


def test_a_block_that_leaves_before_it_could_sink_is_counted() -> None:
    manager = manager_of(1, 2)
    store(manager, A)
    store(manager, B)
    assert [move.key for move in move_all(manager)] == [B]
    assert manager.dropped == {"source_gone": 1}
    assert manager.match([B]) == 1


def test_a_block_that_is_below_already_is_not_counted() -> None:
    manager = manager_of(1, 2)
    for _ in range(2):
        store(manager, A)
        move_all(manager)
        manager.tiers[0].index.discard(A)
    assert not manager.dropped


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_a_target_reported_twice_cannot_touch_the_next_owner_of_its_slot(end: str) -> None:
    manager = manager_of(1)
    (first,) = manager.reserve([A])
    manager.abort(first, "copy_failed")
    (second,) = manager.reserve([B])
    assert second.slot == first.slot
    with pytest.raises(AssertionError, match="not being filled"):
        manager.commit(first) if end == "commit" else manager.abort(first, "copy_failed")
    assert manager.match([B]) == 0, "unfinished bytes are served"
    manager.commit(second)
    assert manager.match([B]) == 1


def test_a_manager_without_tiers_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one tier"):
        BlockManager([])


def test_a_lease_ends_once() -> None:
    manager = manager_of(1)
    store(manager, A)
    sources = manager.lease([A])
    manager.release(sources)
    with pytest.raises(AssertionError, match="is not leased"):
        manager.release(sources)


def test_a_move_ends_once() -> None:
    manager = manager_of(1, 1)
    store(manager, A)
    (move,) = move_all(manager)
    with pytest.raises(KeyError):
        manager.end_move(move, ok=True)


def test_reserve_stops_at_the_first_block_without_room() -> None:
    manager = manager_of(2)
    targets = manager.reserve([A, B, C, D])
    assert [target.key for target in targets] == [A, B]
    assert manager.dropped == {"tier_busy": 2}


def test_a_leased_block_survives_any_pressure() -> None:
    manager = manager_of(2, 1)
    store(manager, A)
    sources = manager.lease([A])
    for _ in range(3):
        store(manager, B, C, D)
    assert manager.lease([A]) == sources
    manager.release(sources * 2)


def test_a_full_backlog_drops_the_newest_and_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cascade, "MAX_WAITING", 300)
    manager = manager_of(4 * MAX_MOVES, 4 * MAX_MOVES)
    keys = [BlockKey(number.to_bytes(32, "big")) for number in range(400)]
    store(manager, *keys[:305])
    assert manager.dropped == {"move_backlog": 5}
    first = manager.take_moves()
    assert [move.key for move in first] == keys[:MAX_MOVES]
    store(manager, *keys[305:])
    assert manager.take_moves() == [], "more copies run at one time than allowed"
    assert manager.has_moves_waiting
    manager.end_move(first[0], ok=False)
    assert len(manager.take_moves()) == 1
    assert manager.moves_in_flight == MAX_MOVES


def test_a_tier_whose_slots_are_all_in_use_drops_the_copy() -> None:
    manager = manager_of(8, 1)
    store(manager, A, B)
    (move,) = manager.take_moves()
    assert manager.dropped == {"tier_busy": 1}
    manager.end_move(move, ok=True)
    assert [A in tier.index for tier in manager.tiers] == [True, True]
    assert [B in tier.index for tier in manager.tiers] == [True, False]


def test_a_block_is_read_from_the_fastest_tier_that_has_it() -> None:
    manager = manager_of(1, 2)
    store(manager, A)
    move_all(manager)
    store(manager, B)
    sources = manager.lease([A, B])
    assert [(source.key, source.tier) for source in sources] == [(A, "tier1"), (B, "tier0")]
    manager.release(sources)


def test_a_damaged_block_below_leaves_the_copy_above_alone() -> None:
    manager = manager_of(1, 1)
    store(manager, A)
    move_all(manager)
    manager.tiers[0].index.discard(A)
    below = manager.lease([A])
    assert below[0].tier == "tier1"
    store(manager, A)
    manager.release(below, damaged={A})
    above = manager.lease([A])
    assert above[0].tier == "tier0"
    manager.release(above)


def test_a_reset_lets_transfers_end_and_keeps_none_of_them() -> None:
    manager = manager_of(4, 4)
    store(manager, A)
    moves = manager.take_moves()
    sources = manager.lease([A])
    targets = manager.reserve([B])
    manager.clear()
    assert manager.match([A]) == 0
    (again,) = manager.reserve([A])
    manager.release(sources)
    manager.commit(targets[0])
    manager.end_move(moves[0], ok=True)
    assert manager.match([A]) == manager.match([B]) == 0
    manager.commit(again)
    assert manager.match([A, B]) == 1
    assert manager.dropped == {"reset": 1, "source_gone": 1}
    assert all(stats.quarantined_blocks == 0 for stats in manager.stats().values())


def test_check_names_a_pin_that_belongs_to_nobody() -> None:
    manager = manager_of(2)
    store(manager, A)
    slot = manager.tiers[0].index.pin(A)
    with pytest.raises(AssertionError, match="differ from leases, moves and timed pins"):
        manager.check()
    assert slot is not None
    manager.tiers[0].index.unpin(slot)
    manager.check()


def test_copies_down_pin_at_most_a_quarter_of_a_small_first_tier() -> None:
    manager = manager_of(8, 9)
    store(manager, A, B, C)
    assert len(manager.take_moves()) == 2
    assert manager.has_moves_waiting


def test_of_a_finished_chain_the_tail_goes_first() -> None:
    manager = manager_of(2)
    store(manager, A, B)
    manager.touch([A, B])
    store(manager, C)
    assert manager.match([A]) == 1
    assert manager.match([A, B]) == 1
