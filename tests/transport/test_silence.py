"""Peers that say nothing, READs that never end, and what is forgotten: scenes of the protocol, played on purpose."""

from __future__ import annotations

import pytest

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.transport.messages import Ask, Done, End, Grant, Ping, Pong
from dynamo_connectors.transport.reader_state import Forget, GiveUp, Instruction
from tests.transport.world import PEER, ROW_BYTES, World, talk

A, B = BlockKey(b"a"), BlockKey(b"b")
LEASE, OTHER = b"l" * 16, b"o" * 16
LONG_SECONDS = 500.0


class Listening(World):
    """Remembers what the reader wanted done."""

    def __init__(self, quarantine_bytes: int = 3 * ROW_BYTES) -> None:
        self.done: list[Instruction] = []
        super().__init__(quarantine_bytes)

    def _obey(self, instruction: Instruction) -> None:
        self.done.append(instruction)
        super()._obey(instruction)

    def given_up(self) -> list[int]:
        return [step.read for step in self.done if isinstance(step, GiveUp)]


def met() -> Listening:
    world = Listening()
    world.export(LEASE, [A, B], [0, 1])
    first = world.read(LEASE, [A], LONG_SECONDS)
    world.settle()
    assert world.asked[first].reasons == (None,)
    return world


def be_silent(world: World, seconds: float) -> None:
    for _ in range(int(seconds / 0.25)):
        world.to_owner.clear()
        world.to_reader.clear()
        world.pass_time(0.25)


def test_a_peer_that_falls_silent_while_asked_costs_two_seconds() -> None:
    world = met()
    started = world.now
    number = world.read(LEASE, [B], LONG_SECONDS)
    while world.asked[number].reasons is None:
        be_silent(world, 0.25)
    assert world.asked[number].reasons == ("unreachable",)
    assert world.now - started < 3.0
    assert "answers no more" in world.reader.complaints[0]
    assert world.reader.counts["nixl_silent_peers", ""] == 1
    at_once = world.read(LEASE, [B], LONG_SECONDS)
    assert world.asked[at_once].reasons == ("unreachable",)
    be_silent(world, 4.0)
    world.export(OTHER, [B], [3])
    again = world.read(OTHER, [B], LONG_SECONDS)
    world.settle()
    assert world.asked[again].reasons == (None,), "it is asked again soon"


def test_a_peer_that_falls_silent_under_a_read_is_given_up_and_its_memory_is_not() -> None:
    world = met()
    number = world.read(LEASE, [B], LONG_SECONDS)
    talk(world)
    assert len(world.transfers) == 1
    be_silent(world, 3.0)
    assert world.given_up() == [number]
    assert world.asked[number].reasons is None, "NIXL may still write to its rows"
    assert world.reader.quarantined_bytes == ROW_BYTES
    assert not world.reader.is_reading, "nobody waits for it: no need to look every moment"
    while world.transfers:
        world.progress(0)
    assert world.asked[number].reasons == ("timeout",)


def test_a_peer_that_answers_is_waited_for() -> None:
    """A READ that takes long: the owner's NIXL is slow, its thread is there."""
    world = met()
    world.read(LEASE, [B], LONG_SECONDS)
    talk(world)
    asked = 0
    for _ in range(40):
        world.pass_time(0.25)
        asked += sum(isinstance(message, Ping) for message in world.to_owner)
        talk(world)
    assert asked >= 5
    assert not world.given_up()
    assert world.reader.is_reading


def test_answers_to_nobody_are_harmless() -> None:
    world = Listening()
    world.reader.receive("a stranger", Pong(b"reader"), 0.0)
    assert not world.reader.take()


def test_who_was_away_calls_nobody_silent() -> None:
    """A reader that was stopped itself, or kept busy, has heard nothing and cannot tell."""
    world = met()
    number = world.read(LEASE, [B], LONG_SECONDS)
    for _ in range(5):
        world.to_owner.clear()
        world.pass_time(30.0)
    assert world.asked[number].reasons is None
    world.settle()
    assert world.asked[number].reasons == ("gone",), "its owner has given it up meanwhile, and says so"


def test_a_read_that_never_ends_restarts_the_data_plane_after_a_minute() -> None:
    world = met()
    number = world.read(LEASE, [B], 1.0)
    talk(world)
    for _ in range(70):
        world.pass_time(0.9)
        talk(world)
    assert world.started_anew == 1
    assert world.asked[number].reasons == ("timeout",)
    assert world.read(LEASE, [A], 8.0)
    world.settle()


def test_peers_that_nobody_asks_for_are_forgotten() -> None:
    world = met()
    world.reader.watch(PEER, LEASE, world.now)
    for _ in range(70):
        world.pass_time(10.0)
        talk(world)
    assert Forget(PEER) not in world.done, "a request still wants it"
    world.reader.unwatch(LEASE, world.now)
    for _ in range(3):
        world.pass_time(10.0)
        talk(world)
    assert Forget(PEER) in world.done
    assert not world.reader._peers
    world.export(OTHER, [A], [3])
    number = world.read(OTHER, [A], 8.0)
    world.settle()
    assert world.asked[number].reasons == (None,), "and met again"


def test_a_lease_ends_after_the_reads_that_use_it() -> None:
    world = met()
    world.reader.watch(PEER, LEASE, world.now)
    number = world.read(LEASE, [B], LONG_SECONDS)
    talk(world)
    world.reader.unwatch(LEASE, world.now)
    world.pass_time(0.5)
    assert not any(isinstance(message, End) for message in world.to_owner)
    assert LEASE in world.pinned
    while world.transfers:
        world.progress(0)
    world.settle()
    assert world.asked[number].reasons == (None,)
    for _ in range(4):
        talk(world)
        world.pass_time(0.5)
    assert LEASE not in world.pinned


@pytest.mark.parametrize("how", ["checked", "out of time"])
def test_an_owner_keeps_what_another_reader_is_reading(how: str) -> None:
    """Two engines may have got one ticket; the first says that it is done."""
    world = met()
    number = world.read(LEASE, [B], 4.0)
    talk(world)
    assert world.owner.receive(End(b"second", LEASE), world.now) is None
    world.collect()
    assert LEASE in world.pinned
    late = world.owner.receive(Ask(b"third", 9, world.epoch, LEASE, (A,), 5.0), world.now)
    assert isinstance(late, Grant)
    assert late.status == "gone", "no new READ of what is to end"
    if how == "checked":
        while world.transfers:
            world.progress(0)
        talk(world)
        assert world.asked[number].reasons == (None,)
    else:
        for _ in range(8):
            world.pass_time(0.9)
    assert LEASE not in world.pinned
    assert world.owner.counts["nixl_leases_ended", "done"] == 1


def test_a_lease_for_two_readers_ends_when_both_have_said_so() -> None:
    """Ranks of an engine with more of them: what one says three times counts once."""
    world = met()
    for _ in range(3):
        world.owner.receive(End(b"first", LEASE, 2), world.now)
    world.collect()
    assert LEASE in world.pinned
    granted = world.owner.receive(Ask(b"second", 9, world.epoch, LEASE, (A,), 5.0), world.now)
    assert isinstance(granted, Grant)
    assert granted.status == "granted"
    world.owner.receive(Done(b"second", 9, LEASE), world.now)
    world.owner.receive(End(b"second", LEASE, 2), world.now)
    world.collect()
    assert LEASE not in world.pinned
