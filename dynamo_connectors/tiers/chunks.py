"""How many blocks make an object of the object tier, and how many objects make the tier. Pure.

An object is a chunk: consecutive blocks of one chain, aligned, named by the last one's key (`NamedTier.chunk_blocks`).
Only whole chunks exist, so what hangs behind a chain's last whole chunk is not in the object tier.
"""

from __future__ import annotations

from dynamo_connectors.errors import ConfigError

#: Objects of 8 to 16 MiB: below, requests per second bound the store, above, a deadline of a second gets tight.
_SMALLEST_OBJECT_BYTES = 8 << 20
#: A chain loses half a chunk of its tail on average, so tiny rows get smaller objects instead of longer chunks.
_MAX_CHUNK_BLOCKS = 32
#: Their index takes 4 GB of host memory; more is a slip of the unit, or needs a store of its own.
MOST_CHUNKS = 1 << 24


def chunk_blocks_for(row_bytes: int) -> int:
    """Blocks of a chunk, a power of two. Objects already stored depend on it: a change here is a change of format."""
    blocks = 1
    while blocks < _MAX_CHUNK_BLOCKS and blocks * row_bytes < _SMALLEST_OBJECT_BYTES:
        blocks *= 2
    return blocks


def capacity_chunks_for(num_bytes: int, object_bytes: int) -> int:
    """How many objects of `object_bytes` fit. Raises `ConfigError` when none does, or more than an index holds."""
    chunks = num_bytes // object_bytes
    if chunks < 1:
        raise ConfigError(
            f"a worker's share of the object_store tier ({num_bytes / 1e9:g} GB) cannot hold one object of "
            f"{object_bytes / 1e9:.3f} GB; raise --kvbm-object-gb"
        )
    if chunks > MOST_CHUNKS:
        raise ConfigError(
            f"a worker's share of the object_store tier ({num_bytes / 1e9:g} GB) is {chunks:.2g} objects of "
            f"{object_bytes / 1e9:.3f} GB, more than its index can hold ({MOST_CHUNKS}); lower --kvbm-object-gb"
        )
    return chunks
