"""KV cache groups: which blocks of which group a prefix of a request needs. Pure arithmetic.

vLLM gives the layers of a hybrid model several block tables, one per group, over one pool of physical blocks: a block
belongs to one group at a time, and all groups lay their layers over the same bytes of it. A group of full attention
needs every block of a prefix; a sliding-window group needs only the blocks that its window reaches from the end.
A block is known by its hash and its group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dynamo_connectors.blocks import BlockKey

#: (group, first block, block behind the last) -> how many of these blocks, from the first on, can be read.
Readable = Callable[[int, int, int], int]


@dataclass(frozen=True)
class Group:
    """One block table. Without `window_tokens` every token attends to all before it."""

    block_tokens: int
    window_tokens: int | None = None

    def first_needed(self, total_tokens: int) -> int:
        """The first block that the token behind `total_tokens` computed ones still attends to."""
        if self.window_tokens is None:
            return 0
        return max(0, total_tokens - self.window_tokens + 1) // self.block_tokens

    def needed(self, local_tokens: int, total_tokens: int) -> range:
        """The blocks to load for a prefix of `total_tokens` whose first `local_tokens` are in HBM."""
        local = local_tokens // self.block_tokens
        return range(max(local, self.first_needed(total_tokens)), total_tokens // self.block_tokens)


@dataclass(frozen=True)
class Geometry:
    """All groups of a model, and how many tokens one of the engine's block hashes covers."""

    groups: tuple[Group, ...]
    hash_tokens: int

    def __post_init__(self) -> None:
        if not self.groups or any(group.block_tokens % self.hash_tokens for group in self.groups):
            raise ValueError(f"{self.groups} cannot be named by hashes of {self.hash_tokens} tokens")

    @property
    def unit_tokens(self) -> int:
        """Prefixes end at multiples of this: there every group ends a block."""
        return math.lcm(*(group.block_tokens for group in self.groups))

    @property
    def has_windows(self) -> bool:
        return any(group.window_tokens is not None for group in self.groups)

    def longest_limit(self, num_tokens: int, num_hashes: int) -> int:
        """The longest prefix that may be asked for.

        The engine computes a request's last token again to sample from it. The window of that token reaches one token
        further back than that of the next, so with windows the last token stays out of the prefix.
        """
        tokens = num_tokens - 1 if self.has_windows else num_tokens
        return min(tokens, num_hashes * self.hash_tokens) // self.unit_tokens * self.unit_tokens

    def longest_prefix(self, local_tokens: int, limit_tokens: int, readable: Readable) -> int:
        """Tokens of the longest usable prefix, at least `local_tokens` and at most `limit_tokens`.

        Walks down from the limit: a missing block rules out every prefix that needs it, that is, all that end behind
        its first token down to where no window reaches it any more.
        """
        total = limit_tokens // self.unit_tokens * self.unit_tokens
        for index, group in enumerate(self.groups):
            if group.window_tokens is None:  # needs all: one look settles it for every shorter prefix
                total = self._reach(index, local_tokens, total, readable)
        windowed = [index for index, group in enumerate(self.groups) if group.window_tokens is not None]
        while total > local_tokens:
            shorter = total
            for index in windowed:
                shorter = self._reach(index, local_tokens, shorter, readable)
            if shorter == total:
                return total
            total = shorter
        return max(total, local_tokens)

    def _reach(self, index: int, local_tokens: int, total: int, readable: Readable) -> int:
        """`total` if the group has all it needs for it, else the longest shorter prefix the gap leaves open."""
        if total <= local_tokens:
            return local_tokens
        group = self.groups[index]
        needed = group.needed(local_tokens, total)
        run = readable(index, needed.start, needed.stop)
        if run >= len(needed):
            return total
        gap_tokens = (needed.start + run) * group.block_tokens
        return max(local_tokens, gap_tokens // self.unit_tokens * self.unit_tokens)


@dataclass
class Chains:
    """The names of one request's blocks, a chain per group, grown as the engine hashes more blocks."""

    geometry: Geometry
    hashes: Sequence[bytes]
    #: Which adapter computes them, as far as the hashes do not tell.
    adapter: bytes = b""
    _keys: list[list[BlockKey]] = field(default_factory=list)

    def keys(self, group: int) -> Sequence[BlockKey]:
        """The keys of all full blocks of `group`. With one group, and no adapter, they are the engine's own hashes."""
        per_block = self.geometry.groups[group].block_tokens // self.geometry.hash_tokens
        if len(self.geometry.groups) == 1 and per_block == 1 and not self.adapter:
            return self.hashes  # type: ignore[return-value]
        while len(self._keys) <= group:
            self._keys.append([])
        keys = self._keys[group]
        # A session that goes on (streamed input) gives its last token up again, and the hash of the block with it.
        # Hashes are chained: when the last one is what it was, all are.
        while keys and (len(keys) * per_block > len(self.hashes) or keys[-1] != self._key(group, len(keys) - 1)):
            keys.pop()
        for block in range(len(keys), len(self.hashes) // per_block):
            keys.append(self._key(group, block))
        return keys

    def _key(self, group: int, block: int) -> BlockKey:
        per_block = self.geometry.groups[group].block_tokens // self.geometry.hash_tokens
        return group_key(self.hashes[(block + 1) * per_block - 1] + self.adapter, group)


def group_key(block_hash: bytes, group: int) -> BlockKey:
    return BlockKey(block_hash + b"/%d" % group)


def group_of(key: BlockKey, num_groups: int) -> int:
    """The group in a key of `Chains`."""
    return int(key.rpartition(b"/")[2]) if num_groups > 1 else 0
