"""The words that a reader looks at after its READ: whatever happens in between, no foreign bytes are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.transport import data_plane
from dynamo_connectors.transport.agent import Region, TransferEndedError, TransferUnknownError
from dynamo_connectors.transport.data_plane import DataPlane
from dynamo_connectors.transport.landing import Landing
from dynamo_connectors.transport.messages import Welcome, WordsPlace
from dynamo_connectors.transport.reader import Reader
from tests.transport.peers import DEADLINE_SECONDS, KEYS, ROW_BYTES, ROWS, PeerProcess
from tests.transport.test_peers import Fleet, Keeper, start_owner
from tests.transport.world import NAMESPACE, World, talk
from tests.vllm.client import wait_until
from tools.server_process import free_port

A, B, C = BlockKey(b"a"), BlockKey(b"b"), BlockKey(b"c")
LEASE = b"l" * 16


def looking(seconds: float = 8.0) -> tuple[World, int]:
    """A world in which all rows of a READ have landed, and none of its words."""
    world = World()
    world.export(LEASE, [A, B], [0, 1])
    number = world.read(LEASE, [A, B], seconds)
    talk(world)
    while not world.transfers[0].has_words:
        world.progress(0)
    return world, number


def land(world: World) -> None:
    while world.transfers:
        world.progress(0)


def test_nothing_is_loaded_before_its_words_have_come_and_nobody_is_asked() -> None:
    world, number = looking()
    assert world.asked[number].reasons is None
    said = len(world.to_reader)
    land(world)
    assert world.asked[number].reasons == (None, None)
    assert world.asked[number].buffers == {0: A, 1: B}
    talk(world)
    assert not world.owner._leases[LEASE].grants, "its owner has heard that it is over"
    assert len(world.to_reader) == said


def test_a_slot_that_is_filled_between_rows_and_words_is_stale_alone() -> None:
    world, number = looking()
    world.memory.begin_fill(1)
    world.memory.end_fill(1, B)
    land(world)
    assert world.asked[number].reasons == (None, "stale")
    assert world.reader.counts["nixl_fences_refused", "other_generation"] == 1


def test_what_is_revoked_between_rows_and_words_is_stale() -> None:
    world, number = looking()
    world.owner.isolate(b"another", NAMESPACE)
    land(world)
    assert world.asked[number].reasons == ("stale", "stale")
    assert world.reader.counts["nixl_fences_refused", "revoked"] == 1


def test_what_is_read_while_this_engine_is_reset_is_not_taken() -> None:
    world, number = looking()
    world.reader.isolate(NAMESPACE + b"2")
    world.obey()
    land(world)
    assert world.asked[number].reasons == ("restarted", "restarted")


def test_words_that_cannot_be_read_prove_nothing() -> None:
    world, number = looking()
    world.disconnect(0)
    assert world.asked[number].reasons == ("disconnected", "disconnected")


def test_words_that_are_late_keep_the_rows_of_their_read() -> None:
    world, number = looking(seconds=1.0)
    world.pass_time(1.5)
    assert world.asked[number].reasons is None
    assert world.reader.quarantined_bytes > 0
    land(world)
    assert world.asked[number].reasons == ("timeout", "timeout")


def test_the_checker_sees_words_that_were_read_before_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.export(LEASE, [A], [0])
    number = world.read(LEASE, [A], 8.0)
    talk(world)
    read = world.reader._reads[number]
    words = [world.words.run[0], *(world.memory.generations[slot] for slot in read.slots)]
    world.memory.begin_fill(0)
    world.memory.end_fill(0, B)
    world.progress(0)
    monkeypatch.setattr(Reader, "_prove", lambda reader, read, now: reader._looked(read, words))
    world.progress(0)
    with pytest.raises(AssertionError, match="foreign bytes"):
        world.check()


def test_rows_of_any_memory_have_places_of_their_own_for_words() -> None:
    regions = [Region(9000, 100), Region(1000, 95)]
    landing = Landing(regions, 10)
    rows = [*range(1000, 1090, 10), *range(9000, 9100, 10)]
    places = {row: landing.places([row]).tolist() for row in rows}
    assert len({place for both in places.values() for place in both}) == 2 * len(rows)
    assert all(landing.region.holds(landing.addresses(np.array(both)), 8).all() for both in places.values())
    together = landing.places(rows)
    assert together.tolist() == [places[rows[0]][0], *(places[row][1] for row in rows)]
    landing._words[together] = np.arange(len(rows) + 1)
    assert landing.words(together) == list(range(len(rows) + 1))


class Failing:
    """An agent whose READs of words fail. A stand-in: the real one cannot be made to."""

    error: Exception
    pieces: list[tuple[int, int]]

    def __init__(self, name: str, regions: list[Region]) -> None: ...

    def connect(self, metadata: bytes) -> str:
        return "peer"

    def post(self, peer: str, local: list[int], remote: list[int], lengths: list[int], devices: object) -> object:
        Failing.pieces = list(zip(remote, lengths, strict=True))
        raise Failing.error

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("error", "why", "under_way"),
    [(TransferEndedError("disconnected", "gone"), "disconnected", 0), (TransferUnknownError("failed", "?"), None, 1)],
)
def test_words_that_nixl_refuses_are_a_miss_or_late(
    monkeypatch: pytest.MonkeyPatch, error: Exception, why: str | None, under_way: int
) -> None:
    monkeypatch.setattr(data_plane, "Agent", Failing)
    Failing.error = error
    plane = DataPlane("reader", [Region(0, 1 << 20)], 8)
    welcome = Welcome(1, b"n", b"run", b"metadata", 4096, 4, 8, words=WordsPlace(500, 1000, 2000))
    assert plane.post_words(1, "tcp://a", [0], [0]) == "unavailable", "nobody was met"
    assert plane.connect("tcp://a", welcome) is None
    assert plane.post_words(1, "tcp://a", [8, 16, 0], [2, 3, 0]) == why
    assert Failing.pieces == [(500, 8), (1016, 16), (1000, 8)]
    assert plane.transfers_under_way == under_way
    assert plane.poll() == [], "what may still come has not ended"
    plane.close()


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    """Both sides are this test's own."""
    with ExitStack() as stack:
        port, reader = free_port(), PeerProcess()
        stack.callback(reader.end)
        reader.call("reader", rows=ROWS, row_bytes=ROW_BYTES, options={"deadline_seconds": DEADLINE_SECONDS})
        owner = start_owner(port)
        stack.callback(owner.end)
        fleet = Fleet(reader, Keeper(owner, port), stack)
        fleet.export()
        fleet.read_until_right()
        yield fleet
        assert reader.call("close")


def read_and(fleet: Fleet, act: Callable[[], object]) -> set[str]:
    """`act` happens when all rows of a READ have come, and none of its words."""
    fleet.reader.call("hold_words")
    number = fleet.start_read()
    assert fleet.reader.call("await_words")
    act()
    fleet.reader.call("free_words")
    return fleet.end_read(number)


def read_until(fleet: Fleet, said: set[str], act: Callable[[], object]) -> None:
    """However slow the machine."""

    def is_told() -> bool:
        fleet.owner.call("fill", slot=3, key=KEYS[3])
        heard = read_and(fleet, act)
        assert heard == said or heard <= {"timeout", "unreachable", "unavailable"}
        return heard == said

    wait_until(is_told, f"the reader says {said}", 60.0)


def test_real_words_tell_what_was_filled_after_the_rows_had_come(fleet: Fleet) -> None:
    read_until(fleet, {"right"}, lambda: None)
    read_until(fleet, {"right", "stale"}, lambda: fleet.owner.call("fill", slot=3, key="another prompt"))
    read_until(fleet, {"right", "stale"}, lambda: fleet.owner.call("fill", slot=3, key=KEYS[3]))


def test_real_words_of_an_owner_that_was_killed_or_started_again_prove_nothing(fleet: Fleet) -> None:
    def restart() -> None:
        fleet.owner.kill()
        fleet.owner = start_owner(fleet.owner_port)
        fleet._stack.callback(fleet.owner.end)

    nothing = {"disconnected", "timeout", "unreachable", "unavailable", "stale"}
    assert read_and(fleet, restart) <= nothing
    fleet.export()
    fleet.read_until_right()
    assert read_and(fleet, lambda: fleet.owner.kill()) <= nothing
