"""What the state machine of `test_block_manager_machine.py` knows by itself about a block manager: plain records."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize

from dynamo_connectors import cascade
from dynamo_connectors.block_manager import BlockManager, Erasure, Move, NamedTier, Source, Target
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.eviction import POLICIES
from dynamo_connectors.tiers.index import TierIndex

MAX_WAITING = 3
DRAM, DISK, OBJECT = "host_dram", "nvme_ssd", "object_store"


def key_of(name: str) -> BlockKey:
    return BlockKey(name.encode() * 16)


#: Two conversations with a common beginning, and a third: a key stands for all keys before it.
CHAINS = [[key_of(name) for name in names] for names in (("s0", "a1", "a2", "a3"), ("s0", "b1", "b2"), ("c0", "c1"))]
chains = st.sampled_from(CHAINS).flatmap(lambda chain: st.integers(1, len(chain)).map(lambda count: chain[:count]))

#: What a slot holds, row by row: the bytes of a key under the weights of an epoch. None: unfinished or damaged.
Bytes = tuple[tuple[BlockKey, int] | None, ...]
Slot = tuple[str, int]  # tier, slot


class Shape(NamedTuple):
    """A tier: entries, blocks of a chunk, requests that must have used a block."""

    capacity: int
    chunk_blocks: int
    min_touches: int


def shapes(most: int, chunk_blocks: int = 1) -> st.SearchStrategy[Shape]:
    return st.builds(Shape, st.integers(1, most), st.just(chunk_blocks), st.sampled_from([1, 1, 2, 3]))


@dataclass
class Kept:
    """An entry that must not leave its slot before `until`."""

    entry: BlockKey
    until: int


class RecordingMachine(RuleBasedStateMachine):
    """A manager, what is under way in it, and what bytes lie where."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = mock.patch.object(cascade, "MAX_WAITING", MAX_WAITING)
        self.limit.start()

    @initialize(
        dram=shapes(6),
        disk=st.none() | shapes(4),
        store=st.none() | st.sampled_from([1, 2, 3]).flatmap(lambda blocks: shapes(3, blocks)),
        policy=st.sampled_from(sorted(POLICIES)),
    )
    def start(self, dram: Shape, disk: Shape | None, store: Shape | None, policy: str) -> None:
        shapes = {DRAM: dram, DISK: disk, OBJECT: store}
        self.shapes = {name: shape for name, shape in shapes.items() if shape is not None}
        self.policy = POLICIES[policy]
        self.now = 0
        self.epoch = 1
        self.bytes_in: dict[Slot, Bytes] = {}
        self.boot()

    def boot(self) -> None:
        self.manager = BlockManager(
            [
                NamedTier(
                    name, TierIndex(shape.capacity, self.policy(shape.capacity), name == OBJECT), shape.chunk_blocks
                )
                for name, shape in self.shapes.items()
            ],
            {name: shape.min_touches for name, shape in self.shapes.items()},
        )
        self.leases: list[tuple[Source, Bytes]] = []
        self.targets: list[tuple[Target, int]] = []
        self.moves: list[tuple[Move, Bytes]] = []
        self.erasures: list[Erasure] = []
        self.kept: dict[Slot, Kept] = {}
        #: How often a block may have been used at most.
        self.uses: Counter[BlockKey] = Counter()
        self.replayed: dict[str, set[BlockKey]] = {name: set() for name in self.shapes}
        self.known_blocks: dict[BlockKey, tuple[BlockKey, ...]] = {}

    def index(self, tier: str) -> TierIndex:
        return next(named.index for named in self.manager.tiers if named.name == tier)

    def entry(self, tier: str, chain: list[BlockKey], position: int) -> BlockKey | None:
        size = self.shapes[tier].chunk_blocks
        last = (position // size + 1) * size - 1
        return chain[last] if last < len(chain) else None

    def places(self, chain: list[BlockKey], position: int) -> list[tuple[str, BlockKey]]:
        """Every tier that can serve block `position`, fastest first, with the entry it is in there."""
        found = [(tier, self.entry(tier, chain, position)) for tier in self.shapes]
        return [(tier, entry) for tier, entry in found if entry is not None and entry in self.index(tier)]

    def busy(self) -> Counter[Slot]:
        """Slots that somebody reads, fills or erases, and how many do."""
        slots = [(source.tier, source.slot) for source, _ in self.leases]
        slots += [(DRAM, target.slot) for target, _ in self.targets]
        slots += [(move.source_tier, move.source_slot) for move, _ in self.moves]
        slots += [(move.target_tier, move.target_slot) for move, _ in self.moves]
        slots += [(erasure.tier, erasure.slot) for erasure in self.erasures]
        return Counter(slots)

    def begin_fill(self, slot: Slot) -> None:
        assert not self.busy()[slot], f"{slot} was handed out while in use"
        assert slot not in self.kept, f"{slot} was handed out while it is pinned"
        assert slot[0] != OBJECT or slot not in self.bytes_in, f"{slot} was handed out before it was erased"
        self.bytes_in[slot] = (None,) * self.shapes[slot[0]].chunk_blocks

    def served(self, tier: str, entry: BlockKey, row: int, key: BlockKey) -> Bytes:
        """The bytes behind an entry, after a look that row `row` is what it should be."""
        slot = self.index(tier).slot_of(entry)
        assert slot is not None
        content = self.bytes_in[tier, slot]
        assert content[row] == (key, self.epoch), f"{tier} slot {slot} row {row} serves {content[row]} for {key!r}"
        return content

    def damage(self, slot: Slot) -> None:
        """The bytes of a slot turn out wrong: so is what has been read from it, and what is being copied."""
        spoilt: Bytes = (None,) * len(self.bytes_in[slot])
        self.bytes_in[slot] = spoilt
        self.kept.pop(slot, None)
        self.leases = [
            (source, spoilt if (source.tier, source.slot) == slot else content) for source, content in self.leases
        ]
        self.moves = [
            (move, spoilt if (move.source_tier, move.source_slot) == slot else content) for move, content in self.moves
        ]
