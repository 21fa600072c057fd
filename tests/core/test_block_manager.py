"""Named cases of `BlockManager`: refusals, reasons and races. The state machine next door covers the rest."""

from __future__ import annotations

import pytest

from dynamo_connectors.block_manager import BlockManager, NamedTier, Spill
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.tiers.index import TierIndex

A, B, C, D = (BlockKey(letter.encode() * 32) for letter in "abcd")


def manager_of(*capacities: int) -> BlockManager:
    return BlockManager([NamedTier(f"tier{place}", TierIndex(count)) for place, count in enumerate(capacities)])


def store(manager: BlockManager, *keys: BlockKey) -> None:
    for target in manager.reserve(keys):
        manager.commit(target)


def spill_all(manager: BlockManager) -> list[Spill]:
    spills = manager.take_spills()
    for spill in spills:
        manager.end_spill(spill, ok=True)
    return spills


def test_a_key_named_twice_is_reserved_once() -> None:
    manager = manager_of(4)
    targets = manager.reserve([A, A, B])
    assert [target.key for target in targets] == [A, B]
    assert not manager.dropped


def test_bytes_found_damaged_while_they_sink_are_not_kept_below() -> None:
    manager = manager_of(2, 2)
    store(manager, A)
    (spill,) = manager.take_spills()
    sources = manager.lease([A])
    manager.release(sources, damaged={A})
    manager.end_spill(spill, ok=True)
    assert manager.match([A]) == 0, "the copy of the damaged bytes is served"
    assert manager.dropped == {"damaged": 1, "source_gone": 1}
    assert [change.kind for change in manager.take_changes()] == ["stored", "removed"]
    assert manager.stats()["tier1"].doomed_blocks == 0


def test_a_block_that_leaves_before_it_could_sink_is_counted() -> None:
    manager = manager_of(1, 2)
    store(manager, A)
    store(manager, B)
    assert [spill.key for spill in spill_all(manager)] == [B]
    assert manager.dropped == {"source_gone": 1}
    assert manager.match([B]) == 1


def test_a_block_that_is_below_already_is_not_counted() -> None:
    manager = manager_of(1, 2)
    for _ in range(2):
        store(manager, A)
        spill_all(manager)
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
