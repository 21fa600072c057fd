"""No order of messages, losses, restarts, expiries and late data makes a reader report foreign bytes as loaded."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.transport.messages import STANDING_LEASE
from tests.transport.world import NAMESPACE, PEER, ROWS, World, talk

KEYS = [BlockKey(b"key%d" % number) for number in range(8)]
LEASES = [bytes([number]) * 16 for number in range(1, 5)]
keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=4, unique=True)
slots = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=4, unique=True)
pick = st.integers(0, 1000)


class Fleet(RuleBasedStateMachine):
    has_words = True

    def __init__(self) -> None:
        super().__init__()
        self.world = World(has_words=self.has_words)
        self.exported: set[tuple[int, bytes]] = set()

    @rule(lease=st.sampled_from(LEASES))
    def announce(self, lease: bytes) -> None:
        self.world.owner.announce(lease, self.world.now)

    @rule(lease=st.sampled_from(LEASES), keys=keys, slots=slots)
    def export(self, lease: bytes, keys: list[BlockKey], slots: list[int]) -> None:
        if (self.world.runs, lease) not in self.exported:
            self.exported.add((self.world.runs, lease))
            self.world.export(lease, keys, slots)

    @rule(
        lease=st.sampled_from([*LEASES, STANDING_LEASE]),
        keys=keys,
        seconds=st.sampled_from([0.3, 2.0, 8.0]),
        in_window=st.booleans(),
    )
    def read(self, lease: bytes, keys: list[BlockKey], seconds: float, in_window: bool) -> None:
        self.world.read(lease, keys, seconds, in_window)

    @precondition(lambda self: self.world.fillings)
    @rule(at=pick)
    def window_is_filled(self, at: int) -> None:
        self.world.proceed(at % len(self.world.fillings))

    @rule()
    def answer_waiting(self) -> None:
        self.world.answer_waiting()

    @rule(lease=st.sampled_from(LEASES), wanted=st.booleans())
    def watch(self, lease: bytes, wanted: bool) -> None:
        if wanted:
            self.world.reader.watch(PEER, lease, self.world.now)
        else:
            self.world.reader.unwatch(lease, self.world.now)
        self.world.obey()

    @precondition(lambda self: self.world.to_owner)
    @rule(at=pick, again=st.booleans())
    def owner_hears(self, at: int, again: bool) -> None:
        self.world.deliver_to_owner(at % len(self.world.to_owner), again)

    @precondition(lambda self: self.world.to_reader)
    @rule(at=pick, again=st.booleans())
    def reader_hears(self, at: int, again: bool) -> None:
        self.world.deliver_to_reader(at % len(self.world.to_reader), again)

    @precondition(lambda self: self.world.to_owner or self.world.to_reader)
    @rule(at=pick)
    def lose(self, at: int) -> None:
        messages: list[object] = self.world.to_owner or self.world.to_reader  # type: ignore[assignment]
        messages.pop(at % len(messages))

    @precondition(lambda self: self.world.transfers)
    @rule(at=pick, part=pick)
    def progress(self, at: int, part: int) -> None:
        self.world.progress(at % len(self.world.transfers), part)

    @rule(
        lease=st.sampled_from(LEASES),
        keys=keys,
        slots=slots,
        rows=st.integers(0, 4),
        part=pick,
        key=st.sampled_from(KEYS),
    )
    def read_and_overtake(
        self, lease: bytes, keys: list[BlockKey], slots: list[int], rows: int, part: int, key: BlockKey
    ) -> None:
        """A READ without a loss, and a slot of it that is filled anew, pinned or not, when so many rows have come.

        By the other rules alone hardly a READ gets as far as its words.
        """
        self.export(lease, keys, slots)
        number = self.world.read(lease, keys, 8.0)
        talk(self.world)
        slots_of_it = self.world.slots_under_read(number)
        for _ in range(rows):
            self.world.go_on(number)
        if slots_of_it:
            self.world.memory.begin_fill(slots_of_it[part % len(slots_of_it)])
            self.world.memory.end_fill(slots_of_it[part % len(slots_of_it)], key)
        while self.world.go_on(number):
            pass

    @precondition(lambda self: self.world.transfers)
    @rule(at=pick)
    def peer_dies(self, at: int) -> None:
        self.world.disconnect(at % len(self.world.transfers))

    @rule(slot=st.integers(0, ROWS - 1), key=st.sampled_from(KEYS), far=st.integers(0, 2), honest=st.booleans())
    def fill(self, slot: int, key: BlockKey, far: int, honest: bool) -> None:
        """The owner fills a slot anew, so far; if it is not honest, even one that is pinned for a lease."""
        if honest and self.world.is_pinned(slot):
            return
        self.world.memory.begin_fill(slot, is_torn=far > 0)
        if far > 1:
            self.world.memory.end_fill(slot, key)

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.6, 4.0]))
    def pass_time(self, seconds: float) -> None:
        reading = {lease for lease in self.world.pinned if self.world.reading(lease)}
        self.world.now += seconds
        still = {lease for lease in reading if self.world.reading(lease)}
        self.world.owner.expire(self.world.now)
        self.world.collect()
        assert still <= self.world.pinned.keys(), "a lease expired under a READ that was granted"
        self.world.pass_time(0.0)

    @rule()
    def reset(self) -> None:
        self.world.owner.revoke_all()
        self.world.collect()

    @rule()
    def reset_reader(self) -> None:
        self.world.reader.isolate(NAMESPACE)
        self.world.obey()

    @rule()
    def restart_owner(self) -> None:
        self.world.start_owner()

    @invariant()
    def nothing_foreign(self) -> None:
        self.world.check()
        self.world.reader.check()
        self.world.owner.check()

    def teardown(self) -> None:
        self.world.settle()
        self.world.check()
        assert all(asked.reasons is not None for asked in self.world.asked.values())


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


class AskedFleet(Fleet):
    """With an owner that has no words to look at."""

    has_words = False


TestAskedFleet = AskedFleet.TestCase
TestAskedFleet.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)
