"""Our own block identity: xxh3 chained over parent, token ids and extra keys. Independent of any engine's
hash.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

# A block's hash has 60 bits, the highest of them set: it is never 0, and as an object it takes 32 bytes, not 48.
_TOP = 1 << 59
_LOW = _TOP - 1


@functools.lru_cache(maxsize=64)
def _packer(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}q")


def root_hash(lora_name: str, cache_salt: str) -> int:
    """The parent of a first block. Prompts under another LoRA or salt never share a block."""
    return xxh3_64_intdigest(f"{lora_name}\x1f{cache_salt}".encode("utf-8", "surrogatepass"))


def packed(token_ids: Sequence[int]) -> bytes:
    """Token ids as they are hashed, 8 bytes each; ids must fit 64 bits (struct.error)."""
    return _packer(len(token_ids)).pack(*token_ids)


def packed_hash(parent: int, block: bytes) -> int:
    """One block's hash, of its packed ids and extra keys."""
    return xxh3_64_intdigest(block, parent) & _LOW | _TOP


def block_hash(parent: int, token_ids: Sequence[int], extra: bytes = b"") -> int:
    """One block's hash. `token_ids` are the ids of that block alone; ids must fit 64 bits (struct.error)."""
    return packed_hash(parent, packed(token_ids) + extra)


def token_chain(token_ids: Sequence[int], block_tokens: int, root: int) -> list[int]:
    """The hashes of all full blocks of a prompt."""
    chain = []
    parent = root
    pack = _packer(block_tokens).pack
    for start in range(0, len(token_ids) - block_tokens + 1, block_tokens):
        parent = xxh3_64_intdigest(pack(*token_ids[start : start + block_tokens]), parent) & _LOW | _TOP
        chain.append(parent)
    return chain
