"""The 4 KiB header before every block on disk. It proves what lies behind it, or the block is a miss.

Layout, little endian: magic 8 | format u32 | key length u32 | namespace 16 | payload length u64 | payload xxh3-64 u64 |
sequence u64 | key (at most 128) | xxh3-64 of all before it u64 | zeros.
"""

from __future__ import annotations

import struct

import xxhash

from dynamo_connectors.blocks import FORMAT_VERSION, NAMESPACE_DIGEST_BYTES, BlockKey
from dynamo_connectors.errors import StoreError

#: One header fills one page, so that the payload behind it stays aligned for O_DIRECT.
HEADER_BYTES = 4096
MAGIC = b"DYNKVBM1"
MAX_KEY_BYTES = 128
_FIXED = struct.Struct(f"<8sII{NAMESPACE_DIGEST_BYTES}sQQQ")
_CHECKSUM = struct.Struct("<Q")


def payload_checksum(payload: memoryview) -> int:
    return xxhash.xxh3_64_intdigest(payload)


def encode(namespace: bytes, key: BlockKey, payload: memoryview, sequence: int) -> bytes:
    """The header of `payload`, HEADER_BYTES long."""
    if len(key) > MAX_KEY_BYTES:
        raise StoreError("key_too_long", f"a block key has {len(key)} bytes, at most {MAX_KEY_BYTES} fit")
    checksum = payload_checksum(payload)
    fixed = _FIXED.pack(MAGIC, FORMAT_VERSION, len(key), namespace, payload.nbytes, checksum, sequence)
    body = fixed + key
    return (body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))).ljust(HEADER_BYTES, b"\0")


def verify(header: bytes | memoryview, namespace: bytes, key: BlockKey, payload: memoryview) -> None:
    """Raises `StoreError` unless `header` proves that `payload` is exactly what was written for `key`."""
    raw = bytes(header[: _FIXED.size + MAX_KEY_BYTES + _CHECKSUM.size])
    magic, version, key_bytes, owner, payload_bytes, checksum, _sequence = _FIXED.unpack_from(raw)
    if magic != MAGIC or version != FORMAT_VERSION:
        raise StoreError("bad_header", "the slot was never written, or by another format")
    if key_bytes > MAX_KEY_BYTES:
        raise StoreError("bad_header", "the slot's header is damaged")
    body_end = _FIXED.size + key_bytes
    if _CHECKSUM.unpack_from(raw, body_end)[0] != xxhash.xxh3_64_intdigest(raw[:body_end]):
        raise StoreError("bad_header", "the slot's header is damaged")
    if owner != namespace:
        raise StoreError("wrong_namespace", "the slot belongs to another model or configuration")
    if raw[_FIXED.size : body_end] != key:
        raise StoreError("wrong_key", "the slot holds another block")
    if payload_bytes != payload.nbytes:
        raise StoreError("wrong_length", f"the slot holds {payload_bytes} bytes, {payload.nbytes} were asked for")
    if checksum != payload_checksum(payload):
        raise StoreError("bad_checksum", "the block's bytes changed on disk")
