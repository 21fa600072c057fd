"""Exact knowledge: which engine holds which KV block, in which media, as its own events say.

Blocks are indexed by our hash (block_hash.py). An engine's own hashes only resolve parents and removals, so
every hash algorithm, seed and version works. One publisher (an engine, or one data-parallel rank of it) is
one source, with a cache of its own. A block takes about 90 bytes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from enum import Enum
from itertools import count

from .block_hash import packed, packed_hash, root_hash
from .compact_map import CompactMap
from .kv_events import AllCleared, BlocksRemoved, BlocksStored, EngineHash, KvEvent
from .prefix_walk import leading_runs

# One bit a tier (G1 to G4), the nearest first; engines have two names for G2 and G3.
MEDIUM_BITS = {"GPU": 1, "CPU": 2, "CPU_PINNED": 2, "STORAGE": 4, "DISK": 4, "EXTERNAL": 8}
_OTHER_MEDIUM_BIT = 16
_UP_TO_TIER = (1, 3, 7)  # media bits of G1, of G1 and G2, of G1 to G3
DEFAULT_MAX_BLOCKS = 1_000_000
_FIRST_EXTRA = 4096  # the number of the first source that is not its engine's first
_MAX_MASKS = 65_536
_64_BITS = (1 << 64) - 1


class Outcome(Enum):
    """What became of one event; the value is a metric label."""

    APPLIED = "applied"
    UNKNOWN_PARENT = "unknown_parent"
    UNKNOWN_BLOCK = "unknown_block"
    WINDOW_GROUP = "window_group"
    FULL = "index_full"


class _Source:
    """The blocks of one publisher. Which nodes it holds, its bit in the index says."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.nodes = CompactMap()  # engine hash -> our node
        self.lower = CompactMap()  # node -> media bits, of the nodes that it holds in more or else than G1
        self.held = 0
        self.window_groups: set[int] = set()


class KvIndex:
    """node -> bitmask of the sources that hold it in any medium; one walk scores every engine.

    An engine's first source has the engine's slot as its number; others, of engines with several, have numbers beyond.
    """

    def __init__(self, max_blocks_per_source: int = DEFAULT_MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks_per_source
        self._holders: dict[int, int] = {}
        self._masks: dict[int, int] = {}  # one object for each mask that is no small number
        self._sources: dict[int, dict[int, _Source]] = {}
        self._slots: dict[int, int] = {}  # of the sources whose number is not their slot
        self._block_tokens: dict[int, int] = {}
        self._tiered = 0  # bitmask of the engines that ever told of a block below G1

    def __len__(self) -> int:
        return len(self._holders)

    def block_tokens(self, slot: int) -> int | None:
        """The engine's block size, known once it stored a block."""
        return self._block_tokens.get(slot)

    def held_blocks(self, slot: int) -> int:
        return sum(source.held for source in self._sources.get(slot, {}).values())

    def media(self, slot: int, node: int) -> int:
        """The media bits under which an engine holds a node (MEDIUM_BITS), 0 for none."""
        bits, holders = 0, self._holders.get(node, 0)
        for source in self._sources.get(slot, {}).values():
            if holders >> source.number & 1:
                bits |= source.lower.get(node) or 1
        return bits

    def apply(self, slot: int, rank: int, event: KvEvent) -> Outcome:
        """Take one event of one source."""
        sources = self._sources.setdefault(slot, {})
        source = sources.get(rank)
        if source is None:
            source = sources[rank] = _Source(self._number(slot, sources))
        if isinstance(event, AllCleared):
            self.clear_source(slot, rank)
            return Outcome.APPLIED
        if isinstance(event, BlocksRemoved):
            return self._remove(source, event)
        return self._store(slot, source, event)

    def walk(self, chain: Sequence[int], mask: int) -> dict[int, int]:
        """How many leading blocks of `chain` each engine of `mask` holds (engines with none are left out)."""
        if not self._slots:
            return leading_runs(self._holders, chain, mask)
        for number, slot in self._slots.items():
            mask |= (mask >> slot & 1) << number
        found: dict[int, int] = {}
        for number, run in leading_runs(self._holders, chain, mask).items():
            slot = self._slots.get(number, number)
            found[slot] = max(found.get(slot, 0), run)
        return found

    def tier_runs(self, slot: int, chain: Sequence[int], depth: int) -> tuple[int, int, int, int]:
        """Of the `depth` leading blocks that an engine holds: how many lead in G1, in G1 or G2, down to G3, in any."""
        if not self._tiered >> slot & 1:
            return depth, depth, depth, depth
        runs, run = [], 0
        for bits in _UP_TO_TIER:
            run = self._run_in(bits, slot, chain, depth, run)
            runs.append(run)
        return runs[0], runs[1], runs[2], depth

    def host_run(self, slot: int, chain: Sequence[int], depth: int) -> int:
        """Of the `depth` leading blocks that an engine holds: how many lead in host memory."""
        return self._run_in(MEDIUM_BITS["CPU"], slot, chain, depth) if self._tiered >> slot & 1 else 0

    def _run_in(self, bits: int, slot: int, chain: Sequence[int], depth: int, least: int = 0) -> int:
        """How many of the leading blocks lie in one of these media; `least` of them surely do."""
        if least == depth or self.media(slot, chain[depth - 1]) & bits:
            return depth
        return bisect_left(range(depth), True, lo=least, key=lambda index: not self.media(slot, chain[index]) & bits)

    def clear_source(self, slot: int, rank: int) -> None:
        """Forget one source's blocks."""
        source = self._sources.get(slot, {}).pop(rank, None)
        if source is None:
            return
        for node in source.nodes.values():
            if self._holders.get(node, 0) >> source.number & 1:
                self._unhold(source, node)
        self._slots.pop(source.number, None)

    def _number(self, slot: int, sources: Mapping[int, _Source]) -> int:
        if all(source.number != slot for source in sources.values()):
            return slot
        assert slot < _FIRST_EXTRA, f"more than {_FIRST_EXTRA} engines"
        number = next(number for number in count(_FIRST_EXTRA) if number not in self._slots)
        self._slots[number] = slot
        return number

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
        else:
            parent = source.nodes.get(_folded(event.parent))
            if not parent:
                return Outcome.UNKNOWN_PARENT
        self._block_tokens[slot] = event.block_tokens
        ids, size, start = packed(event.token_ids), 8 * event.block_tokens, 0
        nodes, holders_of, own = source.nodes, self._holders, 1 << source.number
        for index, engine_hash in enumerate(event.block_hashes):
            extra = event.extra[index] if index < len(event.extra) else b""
            node = packed_hash(parent, ids[start : start + size] + extra)
            start += size
            holders = holders_of.get(node, 0)
            held = holders & own
            if not held and len(nodes) >= self._max_blocks:
                return Outcome.FULL
            name = engine_hash if type(engine_hash) is int and 0 <= engine_hash <= _64_BITS else _folded(engine_hash)
            before = nodes.put(name, node)
            if before and before != node and holders_of.get(before, 0) & own:
                self._unhold(source, before)  # a hash that meant another node no longer holds that one
            if not held:
                source.held += 1
                mask = holders | own
                holders_of[node] = mask if mask <= 256 else self._shared(mask)
                if bit != 1:
                    source.lower.put(node, bit)
            elif bit != 1 or source.lower:
                _add_medium(source, node, bit)
            parent = node
        return Outcome.APPLIED

    def _shared(self, mask: int) -> int:
        """One object for all equal masks (numbers up to 256 are one object each anyway)."""
        if len(self._masks) >= _MAX_MASKS:
            self._masks.clear()
        return self._masks.setdefault(mask, mask)

    def _store_known(self, source: _Source, event: BlocksStored, bit: int) -> Outcome:
        """An event without token ids (a tier's copy): it can only add a medium to blocks we know."""
        outcome = Outcome.APPLIED
        for engine_hash in event.block_hashes:
            node = source.nodes.get(_folded(engine_hash))
            if node and self._holders.get(node, 0) >> source.number & 1:
                _add_medium(source, node, bit)
            else:
                outcome = Outcome.UNKNOWN_BLOCK
        return outcome

    def _remove(self, source: _Source, event: BlocksRemoved) -> Outcome:
        if event.group in source.window_groups:
            return Outcome.WINDOW_GROUP
        bit = MEDIUM_BITS.get(event.medium, _OTHER_MEDIUM_BIT)
        outcome = Outcome.APPLIED
        for engine_hash in event.block_hashes:
            name = _folded(engine_hash)
            node = source.nodes.pop(name)
            if not node or not self._holders.get(node, 0) >> source.number & 1:
                outcome = Outcome.UNKNOWN_BLOCK
                continue
            left = (source.lower.get(node) or 1) & ~bit
            if not left:
                self._unhold(source, node)
                continue
            source.nodes.put(name, node)
            if left > 1:
                source.lower.put(node, left)
            else:
                source.lower.pop(node)
        return outcome

    def _unhold(self, source: _Source, node: int) -> None:
        """A source holds a node no more."""
        source.held -= 1
        if source.lower:
            source.lower.pop(node)
        left = self._holders[node] & ~(1 << source.number)
        if left:
            self._holders[node] = self._shared(left)
        else:
            del self._holders[node]

    def check(self) -> None:
        expected: dict[int, int] = {}
        for slot, ranks in self._sources.items():
            for rank, source in ranks.items():
                where = f"slot {slot} rank {rank}"
                source.nodes.check()
                source.lower.check()
                assert self._slots.get(source.number, source.number) == slot, f"{where}: its number is another's"
                assert len(source.nodes) <= self._max_blocks + 1, f"{where}: more blocks than the bound"
                held = {node for node in source.nodes.values() if self._holders.get(node, 0) >> source.number & 1}
                assert len(held) == source.held, f"{where}: {len(held)} blocks held, {source.held} counted"
                assert {node for node, _ in source.lower.items()} <= held, f"{where}: media of a block that it lacks"
                assert 1 not in set(source.lower.values()), f"{where}: a block in G1 alone is listed"
                for node in held:
                    expected[node] = expected.get(node, 0) | 1 << source.number
        assert expected == self._holders, "a block that no engine hash can remove"


def _add_medium(source: _Source, node: int, bit: int) -> None:
    bits = source.lower.get(node) or 1
    if bits | bit != bits:
        source.lower.put(node, bits | bit)


def _folded(engine_hash: EngineHash) -> int:
    """64 bits of an engine's hash; of a long one those that vLLM itself would tell as a number."""
    return engine_hash & _64_BITS if isinstance(engine_hash, int) else int.from_bytes(engine_hash[-8:], "big")
