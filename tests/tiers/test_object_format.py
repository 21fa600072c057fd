"""The bytes of an object: every row proven by itself, every odd bit refused."""

from __future__ import annotations

import random

import pytest

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers.object_format import chunk_of, encode, object_bytes, object_name, payload_of, row_stride

NAMESPACE = b"n" * 16
KEYS = [BlockKey(bytes([number]) * 32) for number in range(3)]


def rows_of(size: int) -> list[memoryview]:
    return [memoryview(random.Random(number).randbytes(size)) for number in range(len(KEYS))]


@pytest.mark.parametrize("size", [1, 7, 4096, 10_001])
def test_every_row_can_be_proven_alone(size: int) -> None:
    rows = rows_of(size)
    body = memoryview(encode(NAMESPACE, KEYS, rows, size))
    assert len(body) == object_bytes(size, len(KEYS)) == len(KEYS) * row_stride(size)
    for number, key in enumerate(KEYS):
        slot = body[number * row_stride(size) : (number + 1) * row_stride(size)]
        assert payload_of(NAMESPACE, key, slot) == rows[number]


def test_a_row_passes_for_no_other() -> None:
    body = memoryview(encode(NAMESPACE, KEYS, rows_of(100), 100))
    first = body[: row_stride(100)]
    for namespace, key, slot, reason in (
        (NAMESPACE, KEYS[1], first, "wrong_key"),
        (b"m" * 16, KEYS[0], first, "wrong_namespace"),
        (NAMESPACE, KEYS[0], first[:-1], "wrong_length"),
        (NAMESPACE, KEYS[0], body[: row_stride(100) + 1], "wrong_length"),
        (NAMESPACE, KEYS[0], first[:4096], "cut_body"),
        (NAMESPACE, KEYS[0], memoryview(b""), "cut_body"),
        (NAMESPACE, KEYS[0], memoryview(bytes(row_stride(100))), "bad_header"),
        (NAMESPACE, KEYS[0], body[1 : row_stride(100) + 1], "bad_header"),
    ):
        with pytest.raises(StoreError) as caught:
            payload_of(namespace, key, slot)
        assert caught.value.reason == reason


def test_a_flipped_bit_anywhere_that_matters_is_found() -> None:
    body = encode(NAMESPACE, KEYS[:1], rows_of(64)[:1], 64)
    header_end = next(end for end in range(4096, 0, -1) if body[end - 1])
    for position in [*range(header_end), *range(4096, len(body))]:
        body[position] ^= 0x10
        with pytest.raises(StoreError):
            payload_of(NAMESPACE, KEYS[0], memoryview(body))
        body[position] ^= 0x10
    payload_of(NAMESPACE, KEYS[0], memoryview(body))


def test_a_row_of_another_length_is_refused() -> None:
    for size in (0, 99, 101):
        with pytest.raises(ValueError, match="lvalue and rvalue"):
            encode(NAMESPACE, KEYS, rows_of(size), 100)


@pytest.mark.parametrize("name", ["", "xyz", "AB", "a", "ab/cd", " ab", "ab cd", "../ab"])
def test_only_names_we_give_are_chunks(name: str) -> None:
    assert chunk_of(name) is None
    assert chunk_of(object_name(KEYS[1])) == KEYS[1]
