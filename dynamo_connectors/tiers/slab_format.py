"""A slab's first page and its index log as bytes: pure codecs, every piece proven by a checksum or not there at all.

The log holds facts ("at sequence n, slot s held key k"), not commands, so their order does not matter: the newest fact
of a slot wins, a lost one leaves an older fact, and the slot's own header decides what is true when it is read.
Byte tables: docs/on-disk-format.md.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import xxhash

from dynamo_connectors.blocks import NAMESPACE_DIGEST_BYTES, BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers.slot_header import MAX_KEY_BYTES

#: Raised whenever the bytes of a slab or of its log change their meaning; another version is never read.
SLAB_VERSION = 2
PAGE_BYTES = 4096
GENERATION_BYTES = 16

_SLAB_MAGIC, _LOG_MAGIC = b"DYNKSLAB", b"DYNKVLOG"
_SUPERBLOCK = struct.Struct(f"<8sII{NAMESPACE_DIGEST_BYTES}s{GENERATION_BYTES}sQQQ")
_LOG_HEADER = struct.Struct(f"<8sII{GENERATION_BYTES}s")
_CHECKSUM = struct.Struct("<Q")
#: checksum of the rest, sequence, slot, length of the key that follows.
_RECORD = struct.Struct("<QQII")
LOG_HEADER_BYTES = _LOG_HEADER.size + _CHECKSUM.size
MAX_RECORD_BYTES = _RECORD.size + MAX_KEY_BYTES


class Superblock(NamedTuple):
    """What a slab holds. Its `generation` is drawn anew whenever everything in it must be forgotten."""

    namespace: bytes
    generation: bytes
    row_bytes: int
    slot_bytes: int
    capacity_blocks: int


class Fact(NamedTuple):
    sequence: int
    slot: int
    key: BlockKey


def owner_of(namespace: bytes, generation: bytes) -> bytes:
    """The owner that slot headers name: bytes of an earlier generation prove nothing in a later one."""
    return hashlib.blake2b(namespace + generation, digest_size=NAMESPACE_DIGEST_BYTES).digest()


def encode_superblock(block: Superblock) -> bytes:
    """One page."""
    body = _SUPERBLOCK.pack(_SLAB_MAGIC, SLAB_VERSION, PAGE_BYTES, *block)
    return (body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))).ljust(PAGE_BYTES, b"\0")


def decode_superblock(page: bytes) -> Superblock:
    """Raises `StoreError` with the reason why `page` does not open a slab of this format."""
    if len(page) < PAGE_BYTES or page[:8] != _SLAB_MAGIC:
        raise StoreError("bad_superblock", "it was never finished, was forgotten, or is another format's")
    _, version, _, *fields = _SUPERBLOCK.unpack_from(page)
    if version != SLAB_VERSION:
        raise StoreError("bad_superblock", f"it has format version {version}, this is version {SLAB_VERSION}")
    if _CHECKSUM.unpack_from(page, _SUPERBLOCK.size)[0] != xxhash.xxh3_64_intdigest(page[: _SUPERBLOCK.size]):
        raise StoreError("bad_superblock", "its first page is damaged")
    return Superblock(*fields)


def encode_log_header(generation: bytes) -> bytes:
    body = _LOG_HEADER.pack(_LOG_MAGIC, SLAB_VERSION, 0, generation)
    return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def encode_fact(generation: bytes, fact: Fact) -> bytes:
    body = _RECORD.pack(0, fact.sequence, fact.slot, len(fact.key))[_CHECKSUM.size :] + fact.key
    return _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body, _seed(generation))) + body


def holds_key(record: bytes, key: BlockKey) -> bool:
    return record[_RECORD.size :] == key


def read_facts(log: bytes, generation: bytes) -> Iterator[tuple[Fact, bytes]]:
    """The facts of a log of `generation` with their records, up to the first byte that proves nothing."""
    if log[:LOG_HEADER_BYTES] != encode_log_header(generation):
        return
    seed, at, size = _seed(generation), LOG_HEADER_BYTES, len(log)
    while at + _RECORD.size <= size:
        checksum, sequence, slot, key_bytes = _RECORD.unpack_from(log, at)
        end = at + _RECORD.size + key_bytes
        if key_bytes > MAX_KEY_BYTES or end > size:
            return
        record = log[at:end]
        if xxhash.xxh3_64_intdigest(record[_CHECKSUM.size :], seed) != checksum:
            return
        yield Fact(sequence, slot, BlockKey(record[_RECORD.size :])), record
        at = end


def newest_facts(facts: Iterable[tuple[Fact, bytes]], capacity_blocks: int) -> list[tuple[Fact, bytes]]:
    """One fact per slot and per key, the newest of each, oldest first."""
    of_slot: dict[int, tuple[Fact, bytes]] = {}
    for each in facts:
        known = of_slot.get(each[0].slot)
        if each[0].slot < capacity_blocks and (known is None or known[0].sequence < each[0].sequence):
            of_slot[each[0].slot] = each
    ordered = sorted(of_slot.values(), key=lambda each: each[0].sequence)
    of_key = {each[0].key: each for each in ordered}
    return ordered if len(of_key) == len(ordered) else [e for e in ordered if of_key[e[0].key] is e]


def _seed(generation: bytes) -> int:
    """Ties every record to its generation: a leftover of another log is not a record here."""
    return int.from_bytes(generation[:8], "little")
