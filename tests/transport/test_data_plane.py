"""What the reader's side does when NIXL, ZeroMQ or the system fail it: nothing stops, nothing spins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import pytest
import zmq

from dynamo_connectors.errors import ConfigError, StoreError
from dynamo_connectors.transport import channel, data_plane, progress
from dynamo_connectors.transport.agent import Measured, Region
from dynamo_connectors.transport.data_plane import DataPlane
from dynamo_connectors.transport.messages import Welcome
from dynamo_connectors.transport.sockets import PeerSockets
from tests.vllm.client import wait_until
from tools.server_process import free_port

WELCOME = Welcome(1, b"n", b"run", b"metadata", 4096, 4, 8)


class Door(NamedTuple):
    """A peer port, and somebody before it."""

    server: zmq.Socket[Any]
    monitor: zmq.Socket[Any]
    visitor: zmq.Socket[Any]
    address: str


class Flaky:
    """An agent that fails on demand. A stand-in: the real one cannot be made to."""

    starts = 0
    broken = False
    releases_badly = False
    looks = 0
    released = 0

    def __init__(self, name: str, regions: list[Region]) -> None:
        Flaky.starts += 1
        if Flaky.broken:
            raise ConfigError("NIXL is out of something")

    def connect(self, metadata: bytes) -> str:
        return "peer"

    def post(self, *what: object) -> object:
        return object()

    def is_done(self, handle: object) -> bool:
        Flaky.looks -= 1
        return Flaky.looks < 0

    def measured(self, handle: object) -> Measured:
        return Measured(4096, 1, 20, 300)

    def release(self, handle: object) -> None:
        Flaky.released += 1
        if Flaky.releases_badly:
            raise RuntimeError("NIXL_ERR_NOT_POSTED")

    def forget(self, peer: str) -> None:
        raise StoreError("never", "called")

    def close(self) -> None:
        pass


@pytest.fixture
def plane(monkeypatch: pytest.MonkeyPatch) -> Iterator[DataPlane]:
    monkeypatch.setattr(data_plane, "Agent", Flaky)
    Flaky.starts, Flaky.broken, Flaky.releases_badly, Flaky.looks, Flaky.released = 0, False, False, 0, 0
    plane = DataPlane("reader", [Region(0, 1 << 20)], 8)
    yield plane
    plane.close()


def test_a_data_plane_that_does_not_start_again_is_tried_again_later_and_not_in_a_loop(
    plane: DataPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(data_plane.time, "monotonic", lambda: clock[0])
    Flaky.broken = True
    plane.restart()
    assert Flaky.starts == 2
    assert plane.connect("tcp://a", WELCOME) is not None
    assert Flaky.starts == 2, "not so soon"
    pauses = []
    for _ in range(8):
        before, starts = clock[0], Flaky.starts
        while Flaky.starts == starts:
            clock[0] += 0.1
            assert plane.connect("tcp://a", WELCOME) is not None
        pauses.append(clock[0] - before)
    assert pauses[0] < 1.0
    assert 29.0 < pauses[-1] < 31.0
    assert plane.post(1, "tcp://a", [0], [0]) == "unavailable"
    Flaky.broken = False
    clock[0] += 31.0
    assert plane.connect("tcp://a", WELCOME) is None


def test_a_handle_that_cannot_be_released_is_a_read_that_has_ended(plane: DataPlane) -> None:
    Flaky.releases_badly = True
    assert plane.connect("tcp://a", WELCOME) is None
    assert plane.post(1, "tcp://a", [0], [0]) is None
    assert plane.poll() == [(1, None, ())]
    assert plane.transfers_under_way == 0
    assert plane.counts["nixl_transferred_bytes", ""] == 4096
    assert plane.counts["nixl_transfer_microseconds", ""] == 300


@pytest.mark.parametrize(("looks", "released"), [(3, 1), (1 << 30, 0)])
def test_a_read_ends_before_the_agent_does_if_it_ends_soon(
    plane: DataPlane, monkeypatch: pytest.MonkeyPatch, looks: int, released: int
) -> None:
    if not released:
        monkeypatch.setattr(data_plane, "_LAST_READS_SECONDS", 0.05)
    Flaky.looks = looks
    assert plane.connect("tcp://a", WELCOME) is None
    assert plane.post(1, "tcp://a", [0], [0]) is None
    plane.close()
    assert Flaky.released == released
    assert plane.transfers_under_way == 0


def test_without_a_descriptor_for_a_socket_a_message_is_lost_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sockets = PeerSockets(b"s")
    try:
        sockets._context.set(zmq.MAX_SOCKETS, 1)
        caplog.set_level("WARNING")
        for port in (1, 2, 3):  # EMFILE from the second one on
            sockets.send(f"tcp://127.0.0.1:{port}", b"frame")
        sockets.drop("tcp://127.0.0.1:1")
        sockets.drop("tcp://127.0.0.1:1")
        assert sockets.receive(0.0) == []
        assert "limit of open files" in caplog.text
    finally:
        sockets.close()


@pytest.fixture
def door() -> Iterator[Door]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server, context.socket(zmq.DEALER) as visitor:
        port = free_port()
        monitor = channel.serve(server, b"fleet")
        server.bind(f"tcp://127.0.0.1:{port}")
        visitor.setsockopt(zmq.LINGER, 0)
        yield Door(server, monitor, visitor, f"tcp://127.0.0.1:{port}")
        server.disable_monitor()
        monitor.close(linger=0)


@pytest.mark.parametrize(("secret", "reason"), [(b"other", "wrong_secret"), (None, "garbled")])
def test_a_stranger_gets_no_message_through_however_many_parts_it_has(
    door: Door, secret: bytes | None, reason: str
) -> None:
    if secret is not None:
        channel.connect(door.visitor, secret)
    door.visitor.connect(door.address)
    with suppress(zmq.Again):  # ZeroMQ sees that nobody takes it
        for _ in range(100):
            door.visitor.send(bytes(1 << 16), zmq.SNDMORE | zmq.NOBLOCK)
    refused: list[str] = []

    def is_refused() -> bool:
        refused.extend(channel.refusals(door.monitor))
        return reason in refused

    wait_until(is_refused, "the stranger is refused")
    assert set(refused) == {reason}
    assert not door.server.poll(100)


def test_who_has_the_secret_is_heard(door: Door) -> None:
    channel.connect(door.visitor, b"fleet")
    door.visitor.connect(door.address)
    door.visitor.send(b"hello")
    assert door.server.poll(30_000)
    assert door.server.recv_multipart()[1:] == [b"hello"]
    assert channel.refusals(door.monitor) == []


def test_an_agent_is_made_with_a_progress_thread_that_rests() -> None:
    class Bindings:
        nixlAgentConfig: Any = None  # noqa: N815

    class Native:
        def __init__(self) -> None:
            self._delay = -1

        pthrDelay = property(lambda self: self._delay, lambda self, value: setattr(self, "_delay", value))  # noqa: N815

    Bindings.nixlAgentConfig = Native
    with progress.resting_progress(Bindings):
        config = Bindings.nixlAgentConfig()
        config.pthrDelay = 0
    assert config.pthrDelay == 100
    assert Bindings.nixlAgentConfig is Native
    Bindings.nixlAgentConfig = object
    with progress.resting_progress(Bindings):  # a NIXL that has no such setting
        assert Bindings.nixlAgentConfig is object
