"""What an object holds: the rows of one chunk, each behind a slot header that proves it. Pure, no I/O.

There is no header for the object itself, because nobody would read it: a load asks for the rows it wants, and every row
carries format, namespace, key, length and checksum. Row `i` starts at `i * row_stride(row_bytes)`.
"""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers import slot_header
from dynamo_connectors.tiers.slot_header import HEADER_BYTES


def row_stride(row_bytes: int) -> int:
    return HEADER_BYTES + row_bytes


def object_bytes(row_bytes: int, chunk_blocks: int) -> int:
    return chunk_blocks * row_stride(row_bytes)


def object_name(chunk: BlockKey) -> str:
    return chunk.hex()


def chunk_of(name: str) -> BlockKey | None:
    """The chunk that an object is named after; None when we did not name it."""
    try:
        chunk = BlockKey(bytes.fromhex(name))
    except ValueError:
        return None
    return chunk if chunk and object_name(chunk) == name else None


def encode(namespace: bytes, keys: Sequence[BlockKey], rows: Sequence[memoryview], row_bytes: int) -> bytearray:
    """The object of `rows`, each `row_bytes` long."""
    body = bytearray(object_bytes(row_bytes, len(rows)))
    view = memoryview(body)
    for number, (key, row) in enumerate(zip(keys, rows, strict=True)):
        start = number * row_stride(row_bytes)
        payload = view[start + HEADER_BYTES : start + row_stride(row_bytes)]
        payload[:] = row
        view[start : start + HEADER_BYTES] = slot_header.encode(namespace, key, payload, sequence=0)
    return body


def payload_of(namespace: bytes, key: BlockKey, slot: memoryview) -> memoryview:
    """The proven payload of one slot (header and row). Raises `StoreError`."""
    if len(slot) <= HEADER_BYTES:
        raise StoreError("cut_body", "the object is shorter than its rows")
    payload = slot[HEADER_BYTES:]
    slot_header.verify(slot[:HEADER_BYTES], namespace, key, payload)
    return payload
