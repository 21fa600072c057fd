"""Pins with an end: what they keep, how much they may keep, and when they let go."""

from __future__ import annotations

import pytest

from dynamo_connectors.block_manager import BlockManager, NamedTier
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.tiers.index import TierIndex

CHAIN = [BlockKey(bytes([number]) * 32) for number in range(8)]
OTHERS = [BlockKey(bytes([100 + number]) * 32) for number in range(50)]


def manager_of(capacity: int) -> BlockManager:
    return BlockManager([NamedTier("host_dram", TierIndex(capacity))])


def store(manager: BlockManager, keys: list[BlockKey]) -> None:
    for key in keys:
        for target in manager.reserve([key]):
            manager.commit(target)


def pinned(manager: BlockManager) -> int:
    return manager.stats()["host_dram"].pinned_blocks


def test_a_pinned_chain_survives_any_pressure_until_its_time() -> None:
    manager = manager_of(8)
    store(manager, CHAIN[:3])
    assert manager.pin(CHAIN, until=10.0) == 3
    store(manager, OTHERS)
    assert manager.match(CHAIN) == 3
    assert manager.expire_pins(9.9) == 0
    assert manager.expire_pins(10.0) == 3
    store(manager, OTHERS[:8])
    assert manager.match(CHAIN) == 0
    assert pinned(manager) == 0


def test_the_later_end_counts() -> None:
    manager = manager_of(8)
    store(manager, CHAIN[:2])
    manager.pin(CHAIN[:2], until=5.0)
    manager.pin(CHAIN[:1], until=9.0)
    manager.pin(CHAIN[:2], until=3.0)
    assert manager.expire_pins(4.0) == 0
    assert manager.expire_pins(6.0) == 1
    assert manager.expire_pins(8.9) == 0
    assert manager.expire_pins(9.0) == 1
    assert pinned(manager) == 0


def test_renewing_for_ever_costs_nothing_more() -> None:
    manager = manager_of(8)
    store(manager, CHAIN[:2])
    for now in range(1000):
        assert manager.pin(CHAIN[:2], until=now + 10.0) == 2
    assert len(manager._pins._due) == 1


def test_a_flood_of_pins_leaves_half_of_the_tier() -> None:
    manager = manager_of(8)
    store(manager, CHAIN)
    assert manager.pin(CHAIN, until=1e9) == 4
    assert manager.dropped == {"pin_refused": 4}
    store(manager, OTHERS[:20])
    assert manager.match(OTHERS[16:20]) == 4
    assert manager.match(CHAIN) == 4, "the head of the chain is what is kept"


def test_a_tier_of_one_block_cannot_be_pinned() -> None:
    manager = manager_of(1)
    store(manager, CHAIN[:1])
    assert manager.pin(CHAIN, until=5.0) == 0
    assert manager.dropped == {"pin_refused": 8}


def test_a_block_on_its_way_is_pinned_when_it_arrives() -> None:
    manager = manager_of(4)
    (first, second) = manager.reserve(CHAIN[:2])
    assert manager.pin(CHAIN, until=5.0) == 2
    assert pinned(manager) == 0
    manager.commit(first)
    assert pinned(manager) == 1
    manager.abort(second, "copy_failed")
    store(manager, [*CHAIN[1:2], *OTHERS[:9]])
    assert manager.match(CHAIN) == 1
    assert manager.expire_pins(5.0) == 1


def test_a_pin_that_waits_for_a_block_ends_on_time_too() -> None:
    manager = manager_of(4)
    (target,) = manager.reserve(CHAIN[:1])
    manager.pin(CHAIN, until=5.0)
    manager.expire_pins(6.0)
    manager.commit(target)
    assert pinned(manager) == 0


@pytest.mark.parametrize("how", ["damaged", "clear"])
def test_content_that_is_gone_is_not_pinned(how: str) -> None:
    manager = manager_of(4)
    store(manager, CHAIN[:1])
    sources = manager.lease(CHAIN)
    manager.pin(CHAIN, until=5.0)
    if how == "clear":
        manager.clear()
    manager.release(sources, damaged=set(CHAIN) if how == "damaged" else frozenset())
    stats = manager.stats()["host_dram"]
    assert (stats.pinned_blocks, stats.quarantined_blocks) == (0, 0)
    assert manager.expire_pins(9.0) == 0


def test_a_reset_fill_does_not_cost_the_next_one_its_pin() -> None:
    manager = manager_of(4)
    (old,) = manager.reserve(CHAIN[:1])
    manager.clear()
    (new,) = manager.reserve(CHAIN[:1])
    manager.pin(CHAIN, until=5.0)
    manager.abort(old, "copy_failed")
    manager.commit(new)
    assert pinned(manager) == 1
    manager.expire_pins(5.0)


def test_half_of_each_tier() -> None:
    tiers = [NamedTier("host_dram", TierIndex(2)), NamedTier("nvme_ssd", TierIndex(4))]
    manager = BlockManager(tiers)
    manager.restore("nvme_ssd", enumerate(CHAIN[1:4]))
    store(manager, CHAIN[:1])
    assert manager.pin(CHAIN, until=5.0) == 3
    assert {name: stats.pinned_blocks for name, stats in manager.stats().items()} == {"host_dram": 1, "nvme_ssd": 2}
    manager.expire_pins(5.0)
