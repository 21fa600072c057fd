"""Faults caused on real processes over UCX: never wrong bytes, always an end, nothing kept for ever."""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest

from dynamo_connectors.transport.messages import (
    STANDING_LEASE,
    Ask,
    Done,
    Grant,
    Hello,
    Welcome,
)
from tests.transport.peers import DEADLINE_SECONDS, KEYS, ROW_BYTES, ROWS, Between, PeerProcess, Reads
from tests.vllm.client import wait_until
from tools.server_process import free_port


class Keeper(NamedTuple):
    """An owner that outlives a test."""

    process: PeerProcess
    port: int


def start_owner(port: int, **options: object) -> PeerProcess:
    owner = PeerProcess("tcp")
    answer = owner.call("owner", rows=ROWS, row_bytes=ROW_BYTES, port=port, options=options)
    assert answer is None, answer
    for slot, key in enumerate(KEYS):
        owner.call("fill", slot=slot, key=key)
    return owner


class Fleet(Reads):
    """An owner, a reader that all tests share, and somebody between them. An owner that a test may lose is its own."""

    def __init__(self, reader: PeerProcess, keeper: Keeper, stack: ExitStack) -> None:
        self.reader = reader
        self._stack = stack
        self.owner, self.owner_port = keeper
        self.connect()

    def connect(self) -> None:
        self.port = free_port()
        self.between = Between(self.port, self.owner_port)
        self._stack.callback(self.between.close)

    def start_owner(self, **options: object) -> PeerProcess:
        """This test's own, or the next run of it at the same port."""
        if not self._is_own:
            self._is_own = True
            self.owner_port = free_port()
            self.connect()
        self.owner = start_owner(self.owner_port, **options)
        self._stack.callback(self.owner.end)
        return self.owner

    _is_own = False

    def export(self) -> None:
        self.lease = secrets.token_hex(16)
        self.owner.call("export", lease=self.lease, slots={key: slot for slot, key in enumerate(KEYS)})


@pytest.fixture(scope="module")
def reader() -> Iterator[PeerProcess]:
    process = PeerProcess("tcp")
    options = {"deadline_seconds": DEADLINE_SECONDS}
    process.call("reader", rows=ROWS, row_bytes=ROW_BYTES, options=options)
    try:
        yield process
        assert process.call("quarantined") == 0
        assert process.call("close")
    finally:
        process.end()


@pytest.fixture(scope="module")
def keeper() -> Iterator[Keeper]:
    port = free_port()
    owner = start_owner(port)
    try:
        yield Keeper(owner, port)
        wait_until(lambda: owner.call("ended") is not None, "the owner answers")
        assert owner.call("close")
    finally:
        owner.end()


@pytest.fixture
def fleet(reader: PeerProcess, keeper: Keeper) -> Iterator[Fleet]:
    keeper.process.call("counts")
    with ExitStack() as stack:
        yield Fleet(reader, keeper, stack)
        keeper.process.go_on()  # a test that failed may have left it stopped: the others have it, too


def test_blocks_arrive_over_a_network_that_loses_doubles_and_delays(fleet: Fleet) -> None:
    fleet.export()
    fleet.read_until_right()
    fleet.owner.call("fail_once")  # a thread that dies would serve nobody
    chance = random.Random(5)
    fleet.between.hook = lambda message: chance.choice((0, 1, 1, 2))
    for _ in range(12):
        fleet.read()
    fleet.between.hook = lambda message: 1
    fleet.read_until_right()
    counts = fleet.reader.call("counts")
    assert counts["nixl_transferred_bytes|"] >= counts["nixl_read_bytes|"] >= 2 * len(KEYS) * ROW_BYTES
    assert counts["nixl_descriptors|"] >= 2  # neighbours are one
    assert counts["nixl_transfer_microseconds|"] >= counts["nixl_post_microseconds|"] > 0
    fleet.leave()
    wait_until(lambda: fleet.owner.call("ended") == [fleet.lease], "the owner has its blocks back")


def test_blocks_re_used_after_their_lease_are_never_read(fleet: Fleet) -> None:
    """The published corruption: the lease is over, its slots hold another prompt's KV, then the reader comes."""
    owner = fleet.start_owner(lease_seconds=0.3)
    fleet.export()
    wait_until(lambda: owner.call("ended") == [fleet.lease], "the lease has expired")
    for slot in range(len(KEYS)):
        owner.call("fill", slot=slot, key=f"another prompt {slot}")
    fleet.read_until("gone")
    assert owner.call("counts") == {"nixl_leases_ended|expired": 1}


def test_blocks_re_used_under_a_read_are_stale(fleet: Fleet) -> None:
    owner = fleet.owner
    fleet.export()

    def arm() -> None:
        owner.call("fill", slot=3, key=KEYS[3])
        fleet.between.at(Grant, lambda: owner.call("fill", slot=3, key="another prompt"))

    fleet.read_until("right", "stale", before=arm)
    assert fleet.reader.call("counts")["nixl_fences_refused|other_generation"] >= 1
    fleet.between.hook = lambda message: 1
    owner.call("fill", slot=3, key=KEYS[3])


def test_blocks_that_nobody_exported_are_fetched_and_stale_when_they_leave_meanwhile(fleet: Fleet) -> None:
    owner, fleet.lease = fleet.owner, STANDING_LEASE.hex()
    fleet.read_until_right()

    def arm() -> None:
        owner.call("fill", slot=3, key=KEYS[3])
        fleet.between.at(Grant, lambda: owner.call("fill", slot=3, key="another prompt"))

    fleet.read_until("right", "stale", before=arm)
    fleet.between.hook = lambda message: 1
    wait_until(lambda: fleet.read() == {"right", "gone"}, "the block that has left is missing alone", 60.0)
    owner.call("fill", slot=3, key=KEYS[3])


def test_a_holder_that_is_killed_under_a_fetch_costs_the_blocks(fleet: Fleet) -> None:
    owner, fleet.lease = fleet.start_owner(), STANDING_LEASE.hex()
    fleet.read_until_right()
    fleet.between.at(Ask, owner.kill)
    assert fleet.read() <= {"disconnected", "timeout", "unreachable"}


def test_a_reader_that_slept_over_its_lease_gets_nothing(fleet: Fleet) -> None:
    """Stopped between the grant and its READ; when it goes on, everything it was granted is somebody else's."""
    owner = fleet.start_owner(lease_seconds=0.3)
    fleet.export()
    fleet.between.at(Grant, fleet.reader.stop)
    fleet.reader.say("read", port=fleet.port, lease=fleet.lease, keys=KEYS[:1], rows=[0])
    wait_until(lambda: "Grant" in fleet.between.seen, "the read is granted")
    wait_until(lambda: owner.call("ended") == [fleet.lease], "the owner has given it up", 60.0)
    owner.call("fill", slot=0, key="another prompt")
    fleet.reader.go_on()
    assert "right" not in fleet.end_read(fleet.reader.hear())


@pytest.mark.parametrize("kind", [Hello, Welcome, Ask, Done])
def test_an_owner_that_stops_answering_costs_the_deadline(fleet: Fleet, kind: type) -> None:
    """It stands when the reader meets it over NIXL (Welcome), and when it takes leave of it (Ask)."""
    owner = fleet.owner
    fleet.export()
    if kind not in (Hello, Welcome):
        fleet.read_until_right()
    fleet.between.at(kind, owner.stop)
    assert fleet.read() <= ({"right"} if kind is Done else set()) | {"timeout", "unreachable"}
    owner.go_on()
    fleet.between.hook = lambda message: 1
    fleet.read_until_right()


@pytest.mark.parametrize("kind", [Welcome, Grant, Done])
def test_an_owner_that_is_killed_and_started_anew_is_another_owner(fleet: Fleet, kind: type) -> None:
    owner = fleet.start_owner()
    fleet.export()
    fleet.between.at(kind, owner.kill)
    expected = {"timeout", "unreachable", "disconnected", "restarted", "refused", "right"}
    assert fleet.read() <= expected
    fleet.between.hook = lambda message: 1
    fleet.start_owner()
    fleet.read()  # this run has never heard of the lease
    fleet.export()
    fleet.read_until_right()


def test_late_bytes_find_their_memory_quarantined(fleet: Fleet) -> None:
    owner = fleet.owner
    fleet.export()
    fleet.read_until_right()
    fleet.between.at(Grant, owner.stop)
    number = fleet.start_read()
    wait_until(lambda: fleet.reader.call("quarantined") == len(KEYS) * ROW_BYTES, "the READ is late")
    wait_until(lambda: bool(fleet.reader.call("given_up", read=number)), "nobody has to wait for it")
    assert fleet.reader.call("wait", read=number, seconds=0.1) is None, "its rows are nobody else's yet"
    assert fleet.read() == {"unavailable"}
    owner.go_on()
    assert fleet.end_read(number) == {"timeout"}
    wait_until(lambda: fleet.reader.call("quarantined") == 0, "the quarantine is over")
    fleet.read_until_right()


def test_a_full_quarantine_restarts_the_data_plane_and_fences_late_bytes(fleet: Fleet) -> None:
    with ExitStack() as stack:
        small = PeerProcess("tcp")
        stack.callback(small.end)
        options = {"deadline_seconds": DEADLINE_SECONDS, "quarantine_bytes": ROW_BYTES}
        small.call("reader", rows=ROWS, row_bytes=ROW_BYTES, options=options)
        shared, fleet.reader = fleet.reader, small
        owner = fleet.start_owner()
        fleet.export()
        fleet.read_until_right()
        fleet.between.at(Grant, owner.stop)
        number = fleet.start_read()
        assert fleet.end_read(number) == {"timeout"}
        rows = list(range(len(KEYS)))
        small.call("scribble", rows=rows)  # they are somebody else's now
        owner.go_on()
        assert small.call("counts")["nixl_restarts|"] == 1
        fleet.between.hook = lambda message: 1
        # UCX may have killed the owner over the connection that was cut: then it is started anew, as an operator would.
        owner.kill()
        assert small.call("scribbled", rows=rows)
        fleet.start_owner()
        fleet.export()
        fleet.read_until_right()
        assert small.call("close")
        fleet.reader = shared


def lose_a_reader_at(fleet: Fleet, kind: type, deadline_seconds: float) -> None:
    """A reader of this test's own is killed at that message; what it had leased comes back."""
    owner = fleet.start_owner(lease_seconds=0.5)
    with ExitStack() as stack:
        doomed = PeerProcess("tcp")
        stack.callback(doomed.end)
        doomed.call("reader", rows=ROWS, row_bytes=ROW_BYTES, options={"deadline_seconds": deadline_seconds})
        fleet.export()
        fleet.between.at(kind, doomed.kill)
        doomed.say("read", port=fleet.port, lease=fleet.lease, keys=KEYS, rows=list(range(len(KEYS))))
        wait_until(lambda: owner.call("ended") == [fleet.lease], "the owner has its blocks back", 60.0)
    assert owner.call("open_leases") == 0


def test_a_reader_that_is_killed_under_its_read_leaves_nothing(fleet: Fleet) -> None:
    lose_a_reader_at(fleet, Grant, deadline_seconds=1.0)
    fleet.between.hook = lambda message: 1

    def serves_another() -> bool:
        fleet.export()
        fleet.reader.call("watch", port=fleet.port, lease=fleet.lease, wanted=True)  # half a second is short
        said = fleet.read()
        fleet.reader.call("watch", port=fleet.port, lease=fleet.lease, wanted=False)
        assert said <= {"right", "gone", "timeout", "unreachable", "unavailable"}
        return said == {"right"}

    wait_until(serves_another, "another reader is served", 60.0)


@pytest.mark.parametrize("kind", [Welcome, Done])
def test_a_reader_that_is_killed_at_any_other_step_leaves_nothing(fleet: Fleet, kind: type) -> None:
    lose_a_reader_at(fleet, kind, deadline_seconds=5.0)


@pytest.mark.parametrize("how", ["close", "fail"])
def test_a_tier_whose_thread_is_gone_refuses_at_once(how: str) -> None:
    process = PeerProcess("tcp")
    try:
        process.call("reader", rows=1, row_bytes=ROW_BYTES, options={})
        process.call(how)
        number = process.call("read", port=free_port(), lease="ab" * 16, keys=KEYS[:1], rows=[0])
        assert process.call("wait", read=number) == ["closed"]
        assert process.call("close")
    finally:
        process.end()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"namespace": "other model"}, "refused"), ({"truncates": True}, "refused")],
    ids=["model", "metadata"],
)
def test_an_owner_that_does_not_fit_is_refused(fleet: Fleet, options: dict[str, object], said: str) -> None:
    fleet.start_owner(**options)
    fleet.export()
    fleet.read_until(said)


@pytest.mark.parametrize(
    ("options", "reason"), [({"secret": "x"}, "wrong_secret"), ({"version": 9}, "version")], ids=["secret", "version"]
)
def test_a_peer_of_another_fleet_is_not_heard(fleet: Fleet, options: dict[str, object], reason: str) -> None:
    owner = fleet.start_owner(**options)
    fleet.port = fleet.owner_port  # nobody in between: he could not read that either
    fleet.export()
    assert fleet.read() <= {"timeout", "unreachable"}
    assert owner.call("counts")[f"nixl_refused_messages|{reason}"] >= 1
