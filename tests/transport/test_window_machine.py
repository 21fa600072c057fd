"""READs of a window that is too small for all of them, whose rows are filled from host memory that changes meanwhile.

Bytes of another block are never called loaded, a row serves one READ at a time, and all of them come back.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.transport.messages import STANDING_LEASE, Ask, Done, Grant
from dynamo_connectors.transport.window_desk import Source, WindowDesk
from tests.transport.world import ROWS, WINDOW_ROWS, World, talk

KEYS = [BlockKey(b"key%d" % number) for number in range(ROWS)]
LEASE = b"l" * 16
A, B, C = KEYS[:3]
keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=4, unique=True)
pick = st.integers(0, 1000)


def exported() -> World:
    """Every key lies in the slot of its number, and owner and reader have met."""
    world = World(quarantine_bytes=1000)
    world.export(LEASE, KEYS, list(range(ROWS)))
    world.read(LEASE, [A], 8.0)
    talk(world)
    world.settle()
    return world


class Window(RuleBasedStateMachine):
    @initialize()
    def meet(self) -> None:
        self.world = exported()

    @rule(lease=st.sampled_from([LEASE, STANDING_LEASE]), keys=keys, seconds=st.sampled_from([0.5, 8.0]))
    def read(self, lease: bytes, keys: list[BlockKey], seconds: float) -> None:
        self.world.read(lease, keys, seconds, in_window=True)
        talk(self.world)

    @precondition(lambda self: self.world.fillings)
    @rule(at=pick, whole=st.booleans())
    def fill(self, at: int, whole: bool) -> None:
        filling = self.world.fillings[at % len(self.world.fillings)]
        while whole and filling.pairs:
            self.world.proceed(self.world.fillings.index(filling))
        self.world.proceed(self.world.fillings.index(filling))
        talk(self.world)

    @precondition(lambda self: self.world.transfers)
    @rule(at=pick, whole=st.booleans())
    def land(self, at: int, whole: bool) -> None:
        transfer = self.world.transfers[at % len(self.world.transfers)]
        while whole and transfer.parts:
            self.world.progress(self.world.transfers.index(transfer))
        self.world.progress(self.world.transfers.index(transfer))

    @rule()
    def hear(self) -> None:
        talk(self.world)

    @precondition(lambda self: self.world.to_owner)
    @rule(again=st.booleans())
    def say_twice_or_lose(self, again: bool) -> None:
        if again:
            self.world.deliver_to_owner(0, keep=True)
        else:
            self.world.to_owner.pop(0)

    @rule(slot=st.integers(0, ROWS - 1), key=st.sampled_from(KEYS), whole=st.booleans())
    def host_memory_changes(self, slot: int, key: BlockKey, whole: bool) -> None:
        """Not even what a lease pins stays as it was: the fence alone must do."""
        self.world.memory.begin_fill(slot)
        if whole:
            self.world.memory.end_fill(slot, key)

    @rule(seconds=st.sampled_from([0.02, 0.6, 4.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)
        talk(self.world)

    @invariant()
    def nothing_foreign(self) -> None:
        self.world.check()
        self.world.reader.check()
        self.world.owner.check()
        desk = self.world.owner._desk
        being_filled = [row for filling in self.world.fillings for row in filling.fill.rows]
        assert len(set(being_filled)) == len(being_filled), "two fills write to one row"
        assert not set(being_filled) & set(desk._free), "a row is free while it is filled"

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.settle()
        self.world.pass_time(20.0)
        while self.world.fillings:
            self.world.proceed(0)
        self.world.check()
        assert sorted(self.world.owner._desk._free) == list(range(WINDOW_ROWS)), "rows are lost"


TestWindow = Window.TestCase
TestWindow.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_read_of_the_window_is_granted_when_its_rows_are_filled() -> None:
    world = exported()
    number = world.read(LEASE, [C, A], 8.0, in_window=True)
    talk(world)
    assert not world.transfers, "a READ was posted before there was anything to read"
    while world.fillings:
        world.proceed(0)
    talk(world)
    world.settle()
    assert world.asked[number].reasons == (None, None)
    assert world.asked[number].buffers == {0: C, 1: A}


def test_what_was_filled_anew_in_host_memory_while_it_was_copied_is_not_granted() -> None:
    world = exported()
    number = world.read(LEASE, [A, B], 8.0, in_window=True)
    talk(world)
    world.proceed(0)
    world.memory.begin_fill(1)
    world.settle()
    assert world.asked[number].reasons == (None, "gone")


def test_host_memory_may_change_once_the_rows_are_filled() -> None:
    world = exported()
    number = world.read(LEASE, [A], 8.0, in_window=True)
    talk(world)
    while world.fillings:
        world.proceed(0)
    world.memory.begin_fill(0)
    world.settle()
    assert world.asked[number].reasons == (None,)


def test_a_read_whose_rows_serve_another_one_by_now_is_refused() -> None:
    world = exported()
    number = world.read(LEASE, [A], 8.0, in_window=True)
    talk(world)
    while world.fillings:
        world.proceed(0)
    talk(world)
    assert world.transfers, "it reads"
    desk = world.owner._desk
    desk.leave((b"reader", number))
    desk.ask((b"another", 1), [Source(slot, 1) for slot in range(WINDOW_ROWS)], 100.0)
    world.collect()
    world.settle()
    assert world.asked[number].reasons == ("stale",)


def test_more_than_the_window_holds_is_granted_in_part() -> None:
    world = exported()
    number = world.read(LEASE, KEYS[: WINDOW_ROWS + 1], 8.0, in_window=True)
    world.settle()
    assert world.asked[number].reasons == (None,) * WINDOW_ROWS + ("gone",)


def test_reads_are_served_in_turn_and_one_that_is_given_up_gives_its_rows_to_the_next() -> None:
    desk = WindowDesk([0] * 4)
    sources = [Source(slot, 1) for slot in range(3)]
    for reader in (b"first", b"second", b"small"):
        desk.ask((reader, 1), sources[:1] if reader == b"small" else sources, 10.0)
    (fill,) = desk.take_fills()
    assert desk.take_fills() == [], "the small one does not overtake the second"
    desk.expire(11.0)
    assert not desk._reads
    desk.ask((b"late", 1), sources, 20.0)
    assert desk.take_fills() == [], "rows that are still being filled are nobody's"
    assert desk.filled(fill.number, lambda source: True) is None
    (fill,) = desk.take_fills()
    assert desk.filled(fill.number, lambda source: True) == (b"late", 1)
    desk.check()


def test_an_end_that_comes_twice_gives_nothing_back_twice() -> None:
    world = exported()
    number = world.read(LEASE, [A], 8.0, in_window=True)
    world.settle()
    for _ in range(2):
        world.owner.receive(Done(b"reader", number, LEASE), world.now)
        world.owner.check()
    assert sorted(world.owner._desk._free) == list(range(WINDOW_ROWS))


def test_an_owner_without_a_window_says_so_at_once() -> None:
    desk = WindowDesk([])
    desk.ask((b"reader", 1), [Source(0, 1), None], 10.0)
    assert desk.granted((b"reader", 1)) == ((-1, -1), (0, 0))
    assert desk.take_fills() == []


def test_one_who_asks_early_is_answered_when_all_of_it_has_come() -> None:
    world = exported()
    world.memory.guesses.clear()
    world.owner.announce(b"e" * 16, world.now)
    number = world.read(b"e" * 16, [A, B], 8.0)
    talk(world)
    world.memory.guesses[A] = 0
    world.answer_waiting()
    talk(world)
    assert not world.transfers, "half of it is not there yet"
    world.memory.guesses[B] = 1
    world.answer_waiting()
    world.settle()
    assert world.asked[number].reasons == (None, None)


@pytest.mark.parametrize("how", ["revoked", "late"])
def test_one_who_asks_early_is_not_left_waiting(how: str) -> None:
    world = exported()
    world.owner.announce(b"e" * 16, world.now)
    number = world.read(b"e" * 16, [BlockKey(b"never")], 1.0)
    talk(world)
    if how == "revoked":
        world.owner.revoke_all()
    else:
        world.pass_time(1.5)
    world.answer_waiting()
    talk(world)
    assert not world.owner._waiting
    assert world.asked[number].reasons == ("gone" if how == "revoked" else "timeout",)


def test_one_who_asks_for_a_lease_that_is_still_to_come_is_answered_when_it_has() -> None:
    world = exported()
    number = world.read(b"e" * 16, [A, B], 8.0)
    talk(world)
    world.answer_waiting()
    assert not world.to_reader, "nothing is known of it yet"
    world.owner.announce(b"e" * 16, world.now)
    world.answer_waiting()
    (grant,) = world.to_reader
    assert isinstance(grant, Grant)
    assert grant.status == "granted"
    world.settle()
    assert world.asked[number].reasons == (None, None)


def test_a_lease_that_never_comes_is_not_waited_for_for_long() -> None:
    world = exported()
    number = world.read(b"e" * 16, [A], 8.0)
    talk(world)
    world.pass_time(0.5)
    assert world.owner._waiting
    world.pass_time(1.0)
    world.answer_waiting()
    talk(world)
    assert world.asked[number].reasons == ("gone",)
    world.answer_waiting()
    world.pass_time(1.5)
    world.answer_waiting()
    assert not world.owner._waiting


def test_readers_that_died_with_all_rows_keep_nobody_waiting_for_them() -> None:
    desk = WindowDesk([0] * 2)
    desk.ask((b"dead", 1), [Source(0, 1), Source(1, 1)], until=11.0)
    (fill,) = desk.take_fills()
    desk.filled(fill.number, lambda source: True)
    for quarter in range(4, 8):
        desk.expire(quarter / 4)
    desk.ask((b"alive", 1), [Source(2, 1)], until=12.0)
    desk.expire(2.0)
    assert desk.granted((b"alive", 1)) is None
    desk.expire(2.25)
    assert desk.granted((b"alive", 1)) == ((-1,), (0,)), "it waited for rows that nobody gives back"
    desk.check()
    desk.leave((b"alive", 1))
    desk.leave((b"dead", 1))
    desk.ask((b"alive", 2), [Source(2, 1)], until=13.0)
    assert len(desk.take_fills()) == 1, "the rows are free again"
    desk.check()


def test_who_waits_while_others_get_rows_goes_on_waiting() -> None:
    desk = WindowDesk([0])
    for number in range(8):
        desk.ask((b"reader", number), [Source(number, 1)], until=100.0)
    for number in range(7):
        (fill,) = desk.take_fills()
        desk.filled(fill.number, lambda source: True)
        desk.expire(float(number))
        assert desk.granted((b"reader", 7)) is None
        desk.leave((b"reader", number))
        desk.check()
    assert len(desk.take_fills()) == 1


def test_a_reader_behind_a_dead_one_hears_gone_long_before_its_deadline() -> None:
    world = exported()
    for number in range(WINDOW_ROWS):
        world.owner.receive(
            Ask(b"dead", number, world.owner._offer.epoch, LEASE, (bytes(KEYS[number]),), 8.0, True), world.now
        )
    for fill in world.owner.take_fills():
        world.owner.filled(fill.number)
    ask = Ask(b"alive", 1, world.owner._offer.epoch, LEASE, (bytes(KEYS[0]),), 8.0, True)
    for _ in range(6):
        world.owner.expire(world.now)
        told = world.owner.receive(ask, world.now)
        world.now += 0.25
    assert isinstance(told, Grant)
    assert (told.status, told.slots) == ("granted", (-1,))
