"""The object tier's index, by chunks: `chunk_blocks` consecutive blocks of one chain, aligned. Pure, no I/O.

Block `i` of a chain is row `i % chunk_blocks` of its chunk, and only whole chunks exist: what hangs behind the last one
is not in this tier. A chunk is named by the key of its last block, which, block keys being chained, stands for every
block before it. So one entry here remembers `chunk_blocks` blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.eviction import EvictionPolicy
from dynamo_connectors.tiers.index import IndexStats, TierIndex

#: Objects of 8 to 16 MiB: below, requests per second bound the store, above, a deadline of a second gets tight.
_SMALLEST_OBJECT_BYTES = 8 << 20
#: A chain loses half a chunk of its tail on average, so tiny rows get smaller objects instead of longer chunks.
_MAX_CHUNK_BLOCKS = 32


def chunk_blocks_for(row_bytes: int) -> int:
    """Blocks of a chunk, a power of two. Objects already stored depend on it: a change here is a change of format."""
    blocks = 1
    while blocks < _MAX_CHUNK_BLOCKS and blocks * row_bytes < _SMALLEST_OBJECT_BYTES:
        blocks *= 2
    return blocks


def capacity_chunks_for(num_bytes: int, object_bytes: int) -> int:
    """How many objects of `object_bytes` fit. Raises `ConfigError` when none does."""
    chunks = num_bytes // object_bytes
    if chunks < 1:
        raise ConfigError(
            f"a worker's share of the object_store tier ({num_bytes / 1e9:g} GB) cannot hold one object of "
            f"{object_bytes / 1e9:.3f} GB; raise --kvbm-object-gb"
        )
    return chunks


class ChunkRow(NamedTuple):
    """Where a block lies in this tier: row `row` of the chunk named `chunk`."""

    chunk: BlockKey
    row: int


class Chunk(NamedTuple):
    """A whole chunk of a chain: its name, and the position of its first block in the chain."""

    key: BlockKey
    start: int


class ChunkTier:
    """At most `capacity_chunks` chunks. Methods that take `keys` want the whole chain, from block 0.

    A slot is an accounting number, it names no place: objects go by the chunk's key. Not thread-safe.
    """

    def __init__(self, capacity_chunks: int, chunk_blocks: int, policy: EvictionPolicy | None = None) -> None:
        if chunk_blocks < 1:
            raise ValueError(f"a chunk needs at least one block, not {chunk_blocks}")
        self.chunk_blocks = chunk_blocks
        self._chunks = TierIndex(capacity_chunks, policy)

    def row_of(self, keys: Sequence[BlockKey], position: int) -> ChunkRow | None:
        """Where block `position` of the chain belongs, here or not; None behind the chain's last whole chunk."""
        last = position - position % self.chunk_blocks + self.chunk_blocks - 1
        return ChunkRow(keys[last], position % self.chunk_blocks) if last < len(keys) else None

    def whole_chunks(self, keys: Sequence[BlockKey], start: int = 0) -> Iterator[Chunk]:
        """The chunks that lie wholly in the chain and end behind position `start`, known or not, in order."""
        size = self.chunk_blocks
        for first in range(start - start % size, len(keys) - size + 1, size):
            yield Chunk(keys[first + size - 1], first)

    def lookup(self, keys: Sequence[BlockKey], start: int = 0) -> int:
        """Length of the run of blocks that can be read from position `start` on."""
        end = start
        for chunk in self.whole_chunks(keys, start):
            if chunk.key not in self._chunks:
                break
            end = chunk.start + self.chunk_blocks
        return end - start

    def __contains__(self, chunk: BlockKey) -> bool:
        """Whether the chunk can be read now."""
        return chunk in self._chunks

    def is_known(self, chunk: BlockKey) -> bool:
        """Whether the chunk is here or on its way here."""
        return self._chunks.is_known(chunk)

    def slot_of(self, chunk: BlockKey) -> int | None:
        return self._chunks.slot_of(chunk)

    def pin(self, chunk: BlockKey) -> int | None:
        """Protects a readable chunk until `unpin`; one pin per block that is read from it is fine."""
        return self._chunks.pin(chunk)

    def unpin(self, slot: int) -> None:
        self._chunks.unpin(slot)

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Marks a chain as just used, its head last."""
        self._chunks.touch([chunk.key for chunk in self.whole_chunks(keys)])

    def reserve(self, chunk: BlockKey) -> int | None:
        """A place for a chunk, evicting the oldest unpinned one if need be; see `TierIndex.reserve`."""
        return self._chunks.reserve(chunk)

    def commit(self, slot: int) -> bool:
        """The object is stored. False when the chunk was dropped meanwhile: the object must then be deleted."""
        return self._chunks.commit(slot)

    def abort(self, slot: int) -> None:
        self._chunks.abort(slot)

    def discard(self, chunk: BlockKey) -> None:
        """Never serve the chunk from here again. Readers and writers in flight finish in peace."""
        self._chunks.discard(chunk)

    def evict(self, chunks: int) -> int:
        return self._chunks.evict(chunks)

    def clear(self) -> None:
        self._chunks.clear()

    def restore(self, chunk: BlockKey) -> bool:
        """Takes in an object found in the store. False when it is known already or there is no free place for it.

        Nothing is evicted: an object that an earlier run or another replica left is worth less than what is in use.
        """
        stats = self._chunks.stats()
        if stats.ready_blocks + stats.filling_blocks + stats.doomed_blocks >= stats.capacity_blocks:
            return False
        slot = self._chunks.reserve(chunk)
        return slot is not None and self._chunks.commit(slot)

    def readable_chunks(self) -> list[BlockKey]:
        return self._chunks.readable_keys()

    def pinned_slots(self) -> dict[int, int]:
        """slot -> number of pins, for slots with at least one."""
        return self._chunks.pinned_slots()

    def take_evicted(self) -> list[BlockKey]:
        """Chunks evicted to make room since the last call: their objects are to be deleted."""
        return self._chunks.take_evicted()

    def stats(self) -> IndexStats:
        """In blocks, like every tier."""
        size, chunks = self.chunk_blocks, self._chunks.stats()
        return IndexStats(
            capacity_blocks=chunks.capacity_blocks * size,
            ready_blocks=chunks.ready_blocks * size,
            filling_blocks=chunks.filling_blocks * size,
            pinned_blocks=chunks.pinned_blocks * size,
            doomed_blocks=chunks.doomed_blocks * size,
            evicted_blocks_total=chunks.evicted_blocks_total * size,
        )

    def check(self) -> None:
        """Asserts every invariant. O(capacity)."""
        self._chunks.check()
