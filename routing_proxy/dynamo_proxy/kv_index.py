"""Exact knowledge: which engine holds which KV block, in which media, as its own events say.

Blocks are indexed by our hash (block_hash.py). An engine's own hashes only resolve parents and removals, so
every hash algorithm, seed and version works. One publisher (an engine, or one data-parallel rank of it) is
one source.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from enum import Enum

from .block_hash import block_hash, root_hash
from .kv_events import AllCleared, BlocksRemoved, BlocksStored, EngineHash, KvEvent
from .prefix_walk import leading_runs

# One bit a tier (G1 to G4), the nearest first; engines have two names for G2 and G3.
MEDIUM_BITS = {"GPU": 1, "CPU": 2, "CPU_PINNED": 2, "STORAGE": 4, "DISK": 4, "EXTERNAL": 8}
_OTHER_MEDIUM_BIT = 16
_UP_TO_TIER = (1, 3, 7)  # media bits of G1, of G1 and G2, of G1 to G3
DEFAULT_MAX_BLOCKS = 1_000_000


class Outcome(Enum):
    """What became of one event; the value is a metric label."""

    APPLIED = "applied"
    UNKNOWN_PARENT = "unknown_parent"
    UNKNOWN_BLOCK = "unknown_block"
    WINDOW_GROUP = "window_group"
    FULL = "index_full"


class _Source:
    """The blocks of one publisher."""

    def __init__(self) -> None:
        self.nodes: dict[EngineHash, int] = {}  # engine hash -> our node
        self.media: dict[int, int] = {}  # our node -> media bits, never zero
        self.window_groups: set[int] = set()


class KvIndex:
    """node -> bitmask of the engines that hold it in any medium; one walk scores every engine."""

    def __init__(self, max_blocks_per_source: int = DEFAULT_MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks_per_source
        self._holders: dict[int, int] = {}
        self._sources: dict[int, dict[int, _Source]] = {}
        self._block_tokens: dict[int, int] = {}
        self._tiered = 0  # bitmask of the engines that ever told of a block below G1

    def __len__(self) -> int:
        return len(self._holders)

    def block_tokens(self, slot: int) -> int | None:
        """The engine's block size, known once it stored a block."""
        return self._block_tokens.get(slot)

    def held_blocks(self, slot: int) -> int:
        return sum(len(source.media) for source in self._sources.get(slot, {}).values())

    def media(self, slot: int, node: int) -> int:
        """The media bits under which an engine holds a node (MEDIUM_BITS), 0 for none."""
        bits = 0
        for source in self._sources.get(slot, {}).values():
            bits |= source.media.get(node, 0)
        return bits

    def apply(self, slot: int, rank: int, event: KvEvent) -> Outcome:
        """Take one event of one source."""
        source = self._sources.setdefault(slot, {}).setdefault(rank, _Source())
        if isinstance(event, AllCleared):
            self.clear_source(slot, rank)
            return Outcome.APPLIED
        if isinstance(event, BlocksRemoved):
            return self._remove(slot, source, event)
        return self._store(slot, source, event)

    def walk(self, chain: Sequence[int], mask: int) -> dict[int, int]:
        """How many leading blocks of `chain` each engine of `mask` holds (engines with none are left out)."""
        return leading_runs(self._holders, chain, mask)

    def tier_runs(self, slot: int, chain: Sequence[int], depth: int) -> tuple[int, int, int, int]:
        """Of the `depth` leading blocks that an engine holds: how many lead in G1, in G1 or G2, down to G3, in any."""
        if not self._tiered >> slot & 1:
            return depth, depth, depth, depth
        runs, run = [], 0
        for bits in _UP_TO_TIER:
            if run < depth and not self.media(slot, chain[depth - 1]) & bits:
                absent = lambda index, bits=bits: not self.media(slot, chain[index]) & bits  # noqa: E731
                run = bisect_left(range(depth), True, lo=run, key=absent)
            else:
                run = depth
            runs.append(run)
        return runs[0], runs[1], runs[2], depth

    def clear_source(self, slot: int, rank: int) -> None:
        """Forget one source's blocks."""
        source = self._sources.get(slot, {}).pop(rank, None)
        for node in source.media if source is not None else ():
            self._unhold(slot, node)

    def clear(self, slot: int) -> None:
        """Forget an engine."""
        for rank in list(self._sources.get(slot, ())):
            self.clear_source(slot, rank)
        self._sources.pop(slot, None)
        self._block_tokens.pop(slot, None)
        self._tiered &= ~(1 << slot)

    def _store(self, slot: int, source: _Source, event: BlocksStored) -> Outcome:
        if event.is_window:
            # A sliding window forgets its old blocks at once; a prefix hit hangs on the full-attention
            # groups.
            source.window_groups.add(event.group)
            return Outcome.WINDOW_GROUP
        bit = MEDIUM_BITS.get(event.medium, _OTHER_MEDIUM_BIT)
        if bit != 1:
            self._tiered |= 1 << slot
        if not event.token_ids:
            return self._store_known(source, event, bit)
        if event.parent is None:
            parent = root_hash(event.lora_name, event.cache_salt)
        elif event.parent in source.nodes:
            parent = source.nodes[event.parent]
        else:
            return Outcome.UNKNOWN_PARENT
        size = event.block_tokens
        self._block_tokens[slot] = size
        for index, engine_hash in enumerate(event.block_hashes):
            extra = event.extra[index] if index < len(event.extra) else b""
            node = block_hash(parent, event.token_ids[index * size : (index + 1) * size], extra)
            if node not in source.media and len(source.nodes) >= self._max_blocks:
                return Outcome.FULL
            self._rename(slot, source, engine_hash, node)
            source.media[node] = source.media.get(node, 0) | bit
            self._holders[node] = self._holders.get(node, 0) | 1 << slot
            parent = node
        return Outcome.APPLIED

    def _rename(self, slot: int, source: _Source, engine_hash: EngineHash, node: int) -> None:
        """Point an engine hash at a node. A hash that meant another node no longer holds that one."""
        old = source.nodes.get(engine_hash)
        source.nodes[engine_hash] = node
        if old is not None and old != node and old in source.media:
            del source.media[old]
            self._unhold(slot, old)

    def _store_known(self, source: _Source, event: BlocksStored, bit: int) -> Outcome:
        """An event without token ids (a tier's copy): it can only add a medium to blocks we know."""
        outcome = Outcome.APPLIED
        for engine_hash in event.block_hashes:
            node = source.nodes.get(engine_hash)
            if node is None or node not in source.media:
                outcome = Outcome.UNKNOWN_BLOCK
            else:
                source.media[node] |= bit
        return outcome

    def _remove(self, slot: int, source: _Source, event: BlocksRemoved) -> Outcome:
        if event.group in source.window_groups:
            return Outcome.WINDOW_GROUP
        bit = MEDIUM_BITS.get(event.medium, _OTHER_MEDIUM_BIT)
        outcome = Outcome.APPLIED
        for engine_hash in event.block_hashes:
            node = source.nodes.get(engine_hash)
            if node is None or node not in source.media:
                outcome = Outcome.UNKNOWN_BLOCK
                source.nodes.pop(engine_hash, None)
                continue
            left = source.media[node] & ~bit
            if left:
                source.media[node] = left
            else:
                del source.nodes[engine_hash]
                del source.media[node]
                self._unhold(slot, node)
        return outcome

    def _unhold(self, slot: int, node: int) -> None:
        """Drop an engine's bit unless another of its ranks still holds the node."""
        if any(node in source.media for source in self._sources.get(slot, {}).values()):
            return
        left = self._holders[node] & ~(1 << slot)
        if left:
            self._holders[node] = left
        else:
            del self._holders[node]

    def check(self) -> None:
        expected: dict[int, int] = {}
        for slot, ranks in self._sources.items():
            for rank, source in ranks.items():
                where = f"slot {slot} rank {rank}"
                assert len(source.nodes) <= self._max_blocks + 1, f"{where}: more blocks than the bound"
                assert all(source.media.values()), f"{where}: a block in no medium"
                named = set(source.nodes.values())
                assert set(source.media) <= named, f"{where}: a block that no engine hash can remove"
                for node in source.media:
                    expected[node] = expected.get(node, 0) | 1 << slot
        assert expected == self._holders, "the holder index and the sources differ"
