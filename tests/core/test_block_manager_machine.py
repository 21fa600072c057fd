"""`BlockManager` over tiny tiers, against a record of what bytes every slot really holds.

The machine moves no bytes: it notes, for each slot, which key under which weights was last written there. Whatever the
manager serves must be exactly that.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dynamo_connectors import block_manager
from dynamo_connectors.block_manager import BlockManager, NamedTier, Source, Spill, Target
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.tiers.index import TierIndex

MAX_SPILLS = 2
KEYS = [BlockKey(bytes([number]) * 32) for number in range(6)]
keys = st.sampled_from(KEYS)
chains = st.lists(keys, max_size=5)


class Content(NamedTuple):
    """Bytes: those of `key` under the weights of `epoch`. Unfinished or damaged bytes have no key."""

    key: BlockKey | None
    epoch: int


GARBAGE = Content(None, 0)
Place = tuple[int, int]  # tier, slot


class BlockManagerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.limit = mock.patch.object(block_manager, "MAX_SPILLS", MAX_SPILLS)
        self.limit.start()

    def teardown(self) -> None:
        self.limit.stop()

    @initialize(capacities=st.lists(st.integers(1, 3), min_size=1, max_size=3))
    def start(self, capacities: list[int]) -> None:
        tiers = [NamedTier(f"tier{place}", TierIndex(count)) for place, count in enumerate(capacities)]
        self.manager = BlockManager(tiers)
        self.epoch = 1
        self.bytes_in: dict[Place, Content] = {}
        self.leases: list[tuple[Source, Content]] = []
        self.targets: list[tuple[Target, int]] = []
        self.spills: list[tuple[Spill, Content]] = []
        self.waiting: list[tuple[int, BlockKey]] = []
        self.replayed: list[set[BlockKey]] = [set() for _ in capacities]
        self.dropped: Counter[str] = Counter()

    def busy(self) -> Counter[Place]:
        """Places that somebody reads or fills, and how many do."""
        places = [(source.tier, source.slot) for source, _ in self.leases]
        places += [(0, target.slot) for target, _ in self.targets]
        places += [(spill.tier, spill.source_slot) for spill, _ in self.spills]
        places += [(spill.tier + 1, spill.target_slot) for spill, _ in self.spills]
        return Counter(places)

    def fill(self, place: Place) -> None:
        assert not self.busy()[place], f"{place} was handed out while in use"
        self.bytes_in[place] = GARBAGE

    def known(self, tier: int, key: BlockKey) -> bool:
        return self.manager.tiers[tier].index.is_known(key)

    def stored(self, tier: int, key: BlockKey, kept: bool, why_not: str) -> None:
        """Expects a finished block to be readable and to sink further, or to be counted."""
        assert (key in self.manager.tiers[tier].index) or not kept
        if not kept:
            self.dropped[why_not] += 1
        elif tier + 1 < len(self.manager.tiers):
            if len(self.waiting) < MAX_SPILLS:
                self.waiting.append((tier, key))
            else:
                self.dropped["spill_backlog"] += 1

    @rule(chain=chains)
    def match_and_lease(self, chain: list[BlockKey]) -> None:
        readable = [any(key in tier.index for tier in self.manager.tiers) for key in chain]
        run = [*readable, False].index(False)
        assert self.manager.match(chain) == run
        sources = self.manager.lease(chain)
        assert [source.key for source in sources] == chain[:run]
        for source in sources:
            content = self.bytes_in[source.tier, source.slot]
            assert content == (source.key, self.epoch), f"{source} serves {content}"
            assert not any(source.key in tier.index for tier in self.manager.tiers[: source.tier]), "not the fastest"
            self.leases.append((source, content))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        places = data.draw(st.sets(st.integers(0, len(self.leases) - 1), min_size=1))
        self.release_places(places, frozenset())

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release_damaged(self, data: st.DataObject) -> None:
        self.find_damage(data.draw(st.integers(0, len(self.leases) - 1)))

    @precondition(lambda self: self.spills)
    @rule(data=st.data())
    def read_damage_while_it_sinks(self, data: st.DataObject) -> None:
        spill, _ = data.draw(st.sampled_from(self.spills))
        before = len(self.leases)
        self.match_and_lease([spill.key])
        if len(self.leases) > before:
            self.find_damage(before)

    def find_damage(self, place: int) -> None:
        source, _ = self.leases[place]
        slot = self.manager.tiers[source.tier].index.slot_of(source.key)
        self.dropped["damaged"] += slot == source.slot
        self.bytes_in[source.tier, source.slot] = GARBAGE
        damaged = [
            (other, GARBAGE if (other.tier, other.slot) == (source.tier, source.slot) else content)
            for other, content in self.leases
        ]
        self.leases = damaged
        # A copy of damaged bytes is damaged too.
        self.spills = [
            (spill, GARBAGE if (spill.tier, spill.source_slot) == (source.tier, source.slot) else content)
            for spill, content in self.spills
        ]
        self.release_places({place}, frozenset({source.key}))
        assert self.manager.tiers[source.tier].index.slot_of(source.key) != source.slot

    def release_places(self, places: set[int], damaged: frozenset[BlockKey]) -> None:
        for place in places:
            source, content = self.leases[place]
            assert self.bytes_in[source.tier, source.slot] == content, f"{source} changed while leased"
        self.manager.release([self.leases[place][0] for place in sorted(places)], damaged)
        self.leases = [lease for place, lease in enumerate(self.leases) if place not in places]

    @rule(chain=chains)
    def reserve(self, chain: list[BlockKey]) -> None:
        wanted = [key for key in dict.fromkeys(chain) if not self.known(0, key)]
        targets = self.manager.reserve(chain)
        assert [target.key for target in targets] == wanted[: len(targets)]
        self.dropped["tier_busy"] += len(wanted) - len(targets)
        for target in targets:
            self.fill((0, target.slot))
            self.targets.append((target, self.epoch))

    @precondition(lambda self: self.targets)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        self.targets.append(self.targets.pop(data.draw(st.integers(0, len(self.targets) - 1))))
        self.commit_last()

    def commit_last(self) -> None:
        target, epoch = self.targets.pop()
        self.bytes_in[0, target.slot] = Content(target.key, epoch)
        self.manager.commit(target)
        self.stored(0, target.key, epoch == self.epoch, "reset")

    @precondition(lambda self: self.targets)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        target, _ = self.targets.pop(data.draw(st.integers(0, len(self.targets) - 1)))
        self.manager.abort(target, "copy_failed")
        self.dropped["copy_failed"] += 1

    @rule()
    def take_spills(self) -> None:
        known_below = {
            (tier, key) for tier in range(len(self.manager.tiers) - 1) for key in KEYS if self.known(tier + 1, key)
        }
        before = self.manager.dropped.total()
        started = self.manager.take_spills()
        popped = len(self.waiting)
        if self.manager.has_spills_waiting:
            last = (started[-1].tier, started[-1].key) if started else None
            popped = self.waiting.index(last) + 1 if last else 0
        unstarted = Counter(self.waiting[:popped]) - Counter((spill.tier, spill.key) for spill in started)
        excused = known_below | {(spill.tier, spill.key) for spill in started}
        lost = self.manager.dropped.total() - before
        uncounted = sum(count for item, count in unstarted.items() if item not in excused)
        assert uncounted <= lost <= unstarted.total(), f"{unstarted} were not kept, {lost} were counted"
        self.dropped = Counter(self.manager.dropped)
        self.waiting = self.waiting[popped:]
        for spill in started:
            content = self.bytes_in[spill.tier, spill.source_slot]
            assert content == (spill.key, self.epoch), f"{spill} would copy {content}"
            self.fill((spill.tier + 1, spill.target_slot))
            self.spills.append((spill, content))

    @precondition(lambda self: self.spills)
    @rule(data=st.data(), ok=st.booleans())
    def end_spill(self, data: st.DataObject, ok: bool) -> None:
        self.end_spill_at(data.draw(st.integers(0, len(self.spills) - 1)), ok)

    def end_spill_at(self, place: int, ok: bool) -> None:
        spill, content = self.spills.pop(place)
        assert self.bytes_in[spill.tier, spill.source_slot] == content, f"the source of {spill} changed"
        self.bytes_in[spill.tier + 1, spill.target_slot] = content if ok else GARBAGE
        self.manager.end_spill(spill, ok)
        if not ok:
            self.dropped["spill_failed"] += 1
            return
        self.stored(spill.tier + 1, spill.key, content == (spill.key, self.epoch), "source_gone")

    @rule(key=keys)
    def store_and_sink(self, key: BlockKey) -> None:
        """What random single steps reach too seldom: every tier full of readable blocks."""
        before = len(self.targets)
        self.reserve([key])
        if len(self.targets) > before:
            self.commit_last()
        self.take_spills()
        while self.spills:
            self.end_spill_at(0, ok=True)

    @rule(really=st.integers(0, 7))
    def clear(self, really: int) -> None:
        if really:
            return  # tiers that are always empty show nothing
        self.manager.clear()
        self.epoch += 1
        self.waiting = []
        assert self.manager.match(KEYS[:1]) == 0

    @rule()
    def take_changes(self) -> None:
        for change in self.manager.take_changes():
            tier = self.replayed[change.tier]
            if change.kind == "stored":
                assert change.key not in tier, f"{change} came twice"
                tier.add(change.key)
            else:
                assert change.key in tier, f"{change} was never stored"
                tier.remove(change.key)
        for replayed, named in zip(self.replayed, self.manager.tiers, strict=True):
            assert replayed == set(named.index.readable_keys()), f"the changes of {named.name} do not add up"

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check()
        for tier, named in enumerate(self.manager.tiers):
            for key in named.index.readable_keys():
                slot = named.index.slot_of(key)
                assert slot is not None
                content = self.bytes_in[tier, slot]
                assert content == (key, self.epoch), f"{named.name} slot {slot} would serve {content} for {key!r}"
        assert self.manager.spills_in_flight == len(self.spills) <= MAX_SPILLS
        assert self.manager.has_spills_waiting == bool(self.waiting)
        assert len(self.waiting) <= MAX_SPILLS
        assert +self.manager.dropped == +self.dropped


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(max_examples=250, stateful_step_count=60, deadline=None)
