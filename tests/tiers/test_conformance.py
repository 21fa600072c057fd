"""What every tier promises, run on every factory in `factories.py`."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from tests.tiers.conftest import MakeStore
from tests.tiers.tier import Tier

MakeTier = Callable[[int, int], Tier]
ROW = 10_000
ODD_SIZES = [1, 7, 8, 9, 4095, 4096, 4097, 12_345, 70_001]
A, B, C, D = (BlockKey(letter.encode() * 32) for letter in "abcd")


def noise(seed: int, size: int) -> memoryview:
    return memoryview(bytearray(random.Random(seed).randbytes(size)))


def empty(size: int) -> memoryview:
    return memoryview(bytearray(size))


def resources() -> set[tuple[str, str]]:
    """Open descriptors, and the maps of files and of shared memory."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    found = {(line.split()[0], line.split(maxsplit=5)[5]) for line in maps if ".slab" in line or "/dev/zero" in line}
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if os.path.exists(path):  # the descriptor of this listing is gone
            found.add((name, os.readlink(path)))
    return found


@pytest.mark.parametrize("size", ODD_SIZES)
def test_bytes_come_back_as_they_went(make_store: MakeStore, size: int) -> None:
    store = make_store(3, size)
    rows = {slot: noise(slot, size) for slot in (2, 0, 1)}
    for slot, row in rows.items():
        store.write(slot, BlockKey(bytes([slot])), row)
    for slot, row in rows.items():
        into = empty(size)
        store.read(slot, BlockKey(bytes([slot])), into)
        assert into == row


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_rows_may_start_anywhere_in_a_buffer(make_store: MakeStore, offset: int) -> None:
    store = make_store(1, ROW)
    row, around = noise(1, ROW), bytearray(b"\xee" * (ROW + 8))
    source = memoryview(bytearray(offset) + row)[offset:]
    store.write(0, A, source)
    store.read(0, A, memoryview(around)[offset : offset + ROW])
    assert around[offset : offset + ROW] == row
    assert set(around[:offset] + around[offset + ROW :]) == {0xEE}, "bytes beside the row changed"


def test_a_write_replaces_the_block_before_it(make_store: MakeStore) -> None:
    store = make_store(2, ROW)
    store.write(0, A, noise(1, ROW))
    store.write(1, D, noise(4, ROW))
    store.write(0, B, noise(2, ROW))
    store.write(0, B, noise(3, ROW))
    into = empty(ROW)
    store.read(0, B, into)
    assert into == noise(3, ROW)
    store.read(1, D, into)
    assert into == noise(4, ROW)


def test_another_key_is_an_error_and_never_its_bytes(make_store: MakeStore) -> None:
    store = make_store(2, ROW)
    store.write(0, A, noise(1, ROW))
    for slot, key in ((0, B), (0, A[:-1]), (0, A + b"\0"), (0, b""), (1, A)):
        with pytest.raises(StoreError):
            store.read(slot, BlockKey(key), empty(ROW))
    store.write(0, B, noise(2, ROW))
    with pytest.raises(StoreError):
        store.read(0, A, empty(ROW))


def test_a_slot_never_written_is_an_error(make_store: MakeStore) -> None:
    store = make_store(2, ROW)
    with pytest.raises(StoreError) as caught:
        store.read(1, A, empty(ROW))
    assert caught.value.reason
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, ROW - 1, ROW + 1])
def test_a_row_of_another_length_is_refused(make_store: MakeStore, size: int) -> None:
    store = make_store(1, ROW)
    with pytest.raises(ValueError, match="lvalue and rvalue"):
        store.write(0, A, noise(1, size))
    with pytest.raises(StoreError):
        store.read(0, A, empty(ROW))
    store.write(0, A, noise(1, ROW))
    with pytest.raises(ValueError, match="lvalue and rvalue"):
        store.read(0, A, empty(size))


@pytest.mark.parametrize("slot", [-1, 2, 1000])
def test_a_slot_outside_the_capacity_is_an_error(make_store: MakeStore, tmp_path: Path, slot: int) -> None:
    store = make_store(2, ROW)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    with pytest.raises(StoreError):
        store.write(slot, A, noise(1, ROW))
    with pytest.raises(StoreError):
        store.read(slot, A, empty(ROW))
    for inside in (0, 1):
        with pytest.raises(StoreError):
            store.read(inside, A, empty(ROW))
    assert [path.stat().st_size for path in tmp_path.iterdir()] == sizes, "the store grew"


def test_a_closed_store_keeps_and_returns_nothing(make_store: MakeStore) -> None:
    store = make_store(2, ROW)
    store.write(0, A, noise(1, ROW))
    store.close()
    with pytest.raises(StoreError):
        store.read(0, A, empty(ROW))
    with pytest.raises(StoreError):
        store.write(0, A, noise(1, ROW))


def test_slots_are_independent_across_threads(make_store: MakeStore) -> None:
    store = make_store(8, ROW)

    def work(slot: int) -> None:
        for turn in range(20):
            key = BlockKey(bytes([slot, turn]))
            store.write(slot, key, noise(100 * slot + turn, ROW))
            into = empty(ROW)
            store.read(slot, key, into)
            assert into == noise(100 * slot + turn, ROW)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_many_threads_may_read_one_slot(make_store: MakeStore) -> None:
    store = make_store(2, ROW)
    store.write(1, A, noise(1, ROW))

    def read(_: int) -> bytes:
        into = empty(ROW)
        store.read(1, A, into)
        return bytes(into)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(read, range(40))) == {bytes(noise(1, ROW))}


def test_closing_twice_is_closing(make_store: MakeStore) -> None:
    before = resources()
    store = make_store(4, ROW)
    store.write(0, A, noise(1, ROW))
    store.read(0, A, empty(ROW))
    store.close()
    store.close()
    assert resources() <= before


def test_closing_succeeds_while_an_error_of_the_store_is_still_shown(make_store: MakeStore) -> None:
    before = resources()
    store = make_store(4, ROW)
    try:
        store.read(0, A, empty(ROW))
    except StoreError as error:
        store.close()
        kept = error
    assert kept.__traceback__ is not None
    del kept
    assert resources() <= before


def test_a_thread_that_ends_leaves_nothing_behind(make_store: MakeStore) -> None:
    store = make_store(1, ROW)
    store.write(0, A, noise(1, ROW))
    before = resources()
    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(store.read, 0, A, empty(ROW)).result()
    assert resources() <= before


def test_capacity_is_a_hard_bound(make_tier: MakeTier) -> None:
    tier = make_tier(3, ROW)
    for number in range(20):
        assert tier.write(BlockKey(bytes([number])), noise(number, ROW))
        tier.check()
        assert tier.stats().ready_blocks <= 3
    into = empty(ROW)
    kept = [number for number in range(20) if tier.read(BlockKey(bytes([number])), into)]
    assert kept == [17, 18, 19]
    assert tier.stats().evicted_blocks_total == 17


def test_a_tier_that_evicts_for_ever_remembers_no_names(make_tier: MakeTier) -> None:
    tier = make_tier(1, ROW)
    for number in range(5):
        tier.write(BlockKey(bytes([number])), noise(number, ROW))
    tier.evict(ROW)
    assert tier.stats().evicted_blocks_total == 5
    assert tier.index.take_evicted() == [], "nobody takes them, so they would pile up"


def test_a_full_tier_of_busy_blocks_takes_nothing(make_tier: MakeTier) -> None:
    tier = make_tier(2, ROW)
    tier.write(A, noise(1, ROW))
    tier.write(B, noise(2, ROW))
    slots = [tier.index.pin(A), tier.index.pin(B)]
    assert not tier.write(C, noise(3, ROW))
    assert tier.evict(10 * ROW) == 0
    for slot in slots:
        assert slot is not None
        tier.index.unpin(slot)
    assert tier.write(C, noise(3, ROW))


def test_the_block_used_longest_ago_goes_first(make_tier: MakeTier) -> None:
    tier = make_tier(3, ROW)
    for number, key in enumerate((A, B, C)):
        tier.write(key, noise(number, ROW))
    into = empty(ROW)
    assert tier.read(A, into)
    assert tier.write(D, noise(3, ROW))
    assert [key in tier.index for key in (A, B, C, D)] == [True, False, True, True]
    assert tier.lookup([A, C, B, D]) == 2


def test_a_block_is_kept_once(make_tier: MakeTier) -> None:
    tier = make_tier(3, ROW)
    assert tier.write(A, noise(1, ROW))
    assert not tier.write(A, noise(2, ROW))
    into = empty(ROW)
    assert tier.read(A, into)
    assert into == noise(1, ROW)
    assert not tier.read(B, into)


@pytest.mark.parametrize(
    ("num_bytes", "blocks"), [(0, 0), (1, 1), (ROW, 1), (ROW + 1, 2), (3 * ROW, 3), (99 * ROW, 4), (-1, 0)]
)
def test_evict_frees_at_least_what_was_asked(make_tier: MakeTier, num_bytes: int, blocks: int) -> None:
    tier = make_tier(4, ROW)
    for number in range(4):
        tier.write(BlockKey(bytes([number])), noise(number, ROW))
    assert tier.evict(num_bytes) == blocks * ROW
    assert tier.stats().ready_blocks == 4 - blocks
    tier.check()


def test_check_refuses_an_index_larger_than_its_store(make_tier: MakeTier) -> None:
    tier = make_tier(2, ROW)
    tier.store.capacity_blocks = 1
    with pytest.raises(AssertionError, match="more slots than bytes"):
        tier.check()
    tier.store.capacity_blocks = 2
