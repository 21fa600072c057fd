"""Damage on the disk, done to the real file: every one is a miss with its reason, and never bytes."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers.index import TierIndex
from dynamo_connectors.tiers.nvme import NvmeStore, slot_bytes, slot_offset
from dynamo_connectors.tiers.slot_header import HEADER_BYTES, MAX_KEY_BYTES, encode
from tests.tiers.factories import NAMESPACE
from tests.tiers.test_conformance import empty, noise
from tests.tiers.tier import Tier

ROW = 10_000
SLOT = slot_bytes(ROW)
A, B = (BlockKey(letter.encode() * 32) for letter in "ab")
#: Offset in the slot -> the reason it must be refused for. Layout: the docstring of `slot_header`.
REGIONS = {
    "magic": (0, "bad_header"),
    "format": (8, "bad_header"),
    "key_length": (12, "bad_header"),
    "key_length_high": (15, "bad_header"),
    "namespace": (16, "bad_header"),
    "payload_length": (32, "bad_header"),
    "payload_checksum": (40, "bad_header"),
    "sequence": (48, "bad_header"),
    "key_first": (56, "bad_header"),
    "key_last": (56 + 31, "bad_header"),
    "header_checksum": (56 + 32, "bad_header"),
    "header_checksum_last": (56 + 32 + 7, "bad_header"),
    "payload_first": (HEADER_BYTES, "bad_checksum"),
    "payload_middle": (HEADER_BYTES + ROW // 2, "bad_checksum"),
    "payload_last": (HEADER_BYTES + ROW - 1, "bad_checksum"),
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[NvmeStore]:
    store = NvmeStore(tmp_path, 3, ROW, NAMESPACE)
    store.write(0, A, noise(0, ROW))
    store.write(1, A, noise(1, ROW))
    store.write(2, B, noise(2, ROW))
    yield store
    store.close()


def patch(store: NvmeStore, offset: int, data: bytes) -> None:
    """Changes the file at `offset` behind its first slot."""
    with open(store.path, "r+b") as file:
        file.seek(slot_offset(0, ROW) + offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def peek(store: NvmeStore, offset: int, size: int) -> bytes:
    with open(store.path, "rb") as file:
        file.seek(slot_offset(0, ROW) + offset)
        return file.read(size)


def reason_of_miss(store: NvmeStore, slot: int, key: BlockKey) -> str:
    with pytest.raises(StoreError) as caught:
        store.read(slot, key, empty(ROW))
    assert "\n" not in str(caught.value)
    return caught.value.reason


def neighbours_are_whole(store: NvmeStore) -> None:
    into = empty(ROW)
    for slot, key in ((0, A), (2, B)):
        store.read(slot, key, into)
        assert into == noise(slot, ROW)


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("region", REGIONS)
def test_a_flipped_bit_is_a_miss(store: NvmeStore, region: str, bit: int) -> None:
    offset, reason = REGIONS[region]
    (byte,) = peek(store, SLOT + offset, 1)
    patch(store, SLOT + offset, bytes([byte ^ (1 << bit)]))
    assert reason_of_miss(store, 1, A) == reason
    neighbours_are_whole(store)
    store.write(1, A, noise(9, ROW))
    store.read(1, A, empty(ROW))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=st.integers(0, SLOT - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_is_a_miss_or_lies_in_the_padding(store: NvmeStore, offset: int, bit: int) -> None:
    (byte,) = peek(store, SLOT + offset, 1)
    patch(store, SLOT + offset, bytes([byte ^ (1 << bit)]))
    into = empty(ROW)
    try:
        store.read(1, A, into)
        assert into == noise(1, ROW)
        assert 56 + 32 + 8 <= offset < HEADER_BYTES or offset >= HEADER_BYTES + ROW, "damage went unseen"
    except StoreError:
        pass
    finally:
        store.write(1, A, noise(1, ROW))


@pytest.mark.parametrize("torn_at", [512, HEADER_BYTES, HEADER_BYTES + 4096, SLOT - 4096])
def test_a_torn_write_is_a_miss(store: NvmeStore, torn_at: int) -> None:
    patch(store, SLOT + torn_at, bytes(SLOT - torn_at))
    assert reason_of_miss(store, 1, A) == "bad_checksum"
    neighbours_are_whole(store)


def test_a_new_header_before_old_bytes_is_a_miss(store: NvmeStore) -> None:
    """The other half of a torn write: the header reached the disk, the payload behind it did not."""
    old = peek(store, SLOT + HEADER_BYTES, SLOT - HEADER_BYTES)
    store.write(1, A, noise(9, ROW))
    patch(store, SLOT + HEADER_BYTES, old)
    assert reason_of_miss(store, 1, A) == "bad_checksum"


@pytest.mark.parametrize("length", [-4096, 0, SLOT, SLOT + 100, SLOT + HEADER_BYTES, 2 * SLOT - 1])
def test_a_truncated_file_is_a_miss(store: NvmeStore, length: int) -> None:
    os.truncate(store.path, slot_offset(0, ROW) + length)
    assert reason_of_miss(store, 1, A) in ("short_read", "read_failed")
    store.write(1, A, noise(9, ROW))
    store.read(1, A, empty(ROW))


def test_zeros_are_a_miss(store: NvmeStore) -> None:
    patch(store, 0, bytes(3 * SLOT))
    assert [reason_of_miss(store, slot, A) for slot in range(3)] == ["bad_header"] * 3


def test_a_slot_of_another_key_is_a_miss(store: NvmeStore) -> None:
    patch(store, SLOT, peek(store, 2 * SLOT, SLOT))
    assert reason_of_miss(store, 1, A) == "wrong_key"
    into = empty(ROW)
    store.read(1, B, into)
    assert into == noise(2, ROW)


@pytest.mark.parametrize("change", [{"model": "n"}, {"tp_rank": 1, "tp_size": 2}, {"layout_fingerprint": "g"}])
def test_a_slot_of_another_namespace_is_a_miss(store: NvmeStore, tmp_path: Path, change: dict[str, str]) -> None:
    other = NvmeStore(tmp_path, 3, ROW, replace(NAMESPACE, **change))
    other.write(1, A, noise(9, ROW))
    patch(store, SLOT, peek(other, SLOT, SLOT))
    other.close()
    assert reason_of_miss(store, 1, A) == "wrong_namespace"


def test_a_shorter_row_under_the_same_key_is_a_miss(store: NvmeStore) -> None:
    patch(store, SLOT, encode(store._owner, A, noise(1, ROW - 1), 1))
    assert reason_of_miss(store, 1, A) == "wrong_length"


def test_a_key_length_beyond_the_header_is_a_miss_even_with_a_true_checksum(store: NvmeStore) -> None:
    for length in (MAX_KEY_BYTES + 1, 0xFFFFFFFF):
        body = bytearray(peek(store, SLOT, 56 + 32))
        struct.pack_into("<I", body, 12, length)
        patch(store, SLOT, bytes(body) + struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(body))))
        assert reason_of_miss(store, 1, A) == "bad_header"


def test_keys_as_long_as_they_may_be(store: NvmeStore) -> None:
    longest = BlockKey(b"k" * MAX_KEY_BYTES)
    store.write(1, longest, noise(9, ROW))
    into = empty(ROW)
    store.read(1, longest, into)
    assert into == noise(9, ROW)
    with pytest.raises(StoreError, match="key_too_long"):
        store.write(1, BlockKey(longest + b"k"), noise(1, ROW))


def test_a_disk_that_refuses_writes_is_a_miss(store: NvmeStore) -> None:
    read_only = os.open(store.path, os.O_RDONLY | os.O_CLOEXEC)
    writable, store._fd = store._fd, read_only
    try:
        with pytest.raises(StoreError, match="write_failed"):
            store.write(1, B, noise(9, ROW))
        assert reason_of_miss(store, 1, B) == "wrong_key"
    finally:
        store._fd = writable
        os.close(read_only)
    neighbours_are_whole(store)


def test_a_tier_forgets_a_damaged_block_and_takes_it_again(store: NvmeStore) -> None:
    tier = Tier("nvme_ssd", TierIndex(3), store)
    assert tier.write(A, noise(1, ROW))
    slot = tier.index.slot_of(A)
    assert slot is not None
    patch(store, slot * SLOT + HEADER_BYTES, b"damage!")
    with pytest.raises(StoreError, match="bad_checksum"):
        tier.read(A, empty(ROW))
    tier.check()
    assert not tier.read(A, empty(ROW))
    assert tier.write(A, noise(1, ROW))
    assert tier.read(A, empty(ROW))


def test_a_failed_write_leaves_the_slot_to_others(store: NvmeStore) -> None:
    tier = Tier("nvme_ssd", TierIndex(1), store)
    with pytest.raises(StoreError, match="key_too_long"):
        tier.write(BlockKey(b"k" * 200), noise(1, ROW))
    tier.check()
    assert tier.stats().filling_blocks == 0
    assert tier.write(A, noise(1, ROW))
