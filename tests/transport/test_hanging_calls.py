"""A call of NIXL that does not return keeps the reader's thread: nobody waits for it, and its rows stay taken."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.tiers.base import Batch, Place
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.transport import data_plane
from dynamo_connectors.transport.agent import Region, TransferEndedError
from dynamo_connectors.transport.peer_tier import PeerSettings, PeerTier
from dynamo_connectors.transport.server import PeerServer, ServerSettings
from dynamo_connectors.transport.tickets import Ticket
from tests.vllm.client import wait_until

ROW_BYTES, SECRET, LEASE = 64, b"s", b"l" * 16
KEY = BlockKey(b"key")


class Hanging:
    """The reader's agent: every READ is done at once, within this process.

    A stand-in: the real one cannot be made to hang in each call.
    """

    #: The call that hangs, until `released`.
    call = ""
    released = threading.Event()
    reached = threading.Event()

    def __init__(self, name: str, regions: list[Region]) -> None:
        self.hang("start")

    def hang(self, call: str) -> None:
        if call == Hanging.call:
            Hanging.reached.set()
            assert Hanging.released.wait(300)

    def connect(self, metadata: bytes) -> str:
        self.hang("connect")
        return "peer"

    def post(self, peer: str, local: list[int], remote: list[int], num_bytes: list[int], devices: object) -> object:
        self.hang("post")
        for piece in zip(local, remote, num_bytes, strict=True):
            ctypes.memmove(*map(int, piece))
        return object()

    def is_done(self, handle: object) -> bool:
        self.hang("is_done")
        if Hanging.call == "forget":
            raise TransferEndedError("disconnected", "so that it takes leave")
        return True

    def measured(self, handle: object) -> None:
        return None

    def release(self, handle: object) -> None:
        self.hang("release")

    def forget(self, peer: str) -> None:
        self.hang("forget")

    def close(self) -> None:
        self.hang("close")


class Pair:
    def __init__(self) -> None:
        self.owner = DramStore(4, ROW_BYTES)
        self.owner.write(1, KEY, memoryview(np.full(ROW_BYTES, 7, dtype=np.uint8)))
        self.server = PeerServer(ServerSettings("127.0.0.1", 0, b"n", SECRET), self.owner)
        self.rows = np.zeros((2, ROW_BYTES), dtype=np.uint8)
        settings = PeerSettings(0, b"n", ROW_BYTES, SECRET, deadline_seconds=300.0)
        self.tier = PeerTier(settings, [Region(self.rows.ctypes.data, self.rows.nbytes)])
        self.server.export(LEASE, {KEY: 1})

    def read(self) -> Batch:
        ticket = BlockKey(Ticket("127.0.0.1", self.server.port, LEASE).encode())
        (batch,) = self.tier.read([Place(KEY, 0, ticket)], [memoryview(self.rows[0])])
        return batch

    def stalls(self) -> int:
        return self.tier.take_counts()["nixl_stalls", ""]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(data_plane, "Agent", Hanging)
    Hanging.call = ""
    Hanging.released.clear()
    Hanging.reached.clear()
    pair = Pair()
    try:
        yield pair
    finally:
        Hanging.released.set()
        wait_until(lambda: pair.tier.close(0.0), "its thread ends", 60.0)
        assert pair.server.close()


def reason_of(outcome: Sequence[Any]) -> str | None:
    return None if outcome[0] is None else str(outcome[0].reason)


def is_right(pair: Pair) -> bool:
    return reason_of(pair.read().outcome.result(60)) is None


@pytest.mark.parametrize("call", ["connect", "post", "is_done", "release"])
def test_whoever_waits_is_told_and_the_rows_stay_taken_until_the_call_returns(pair: Pair, call: str) -> None:
    Hanging.call = call
    batch = pair.read()
    assert batch.given_up is not None
    assert batch.given_up.result(60) == "unavailable"
    assert Hanging.reached.wait(60)
    assert not batch.outcome.done(), "NIXL may still write to its row"
    assert reason_of(pair.read().outcome.result(60)) == "unavailable", "nobody waits for the next one at all"
    assert pair.stalls() >= 1
    Hanging.released.set()
    assert batch.outcome.result(60) is not None
    wait_until(lambda: is_right(pair), "it reads again", 60.0)


def test_reads_that_wait_behind_the_call_are_told_and_never_started(pair: Pair) -> None:
    Hanging.call = "connect"
    first = pair.read()
    assert Hanging.reached.wait(60)
    behind = pair.read()
    for batch in (first, behind):
        assert batch.given_up is not None
        assert batch.given_up.result(60) == "unavailable"
    Hanging.call = ""
    Hanging.released.set()
    assert reason_of(behind.outcome.result(60)) == "unavailable"


def test_whoever_waits_hears_of_a_lost_peer_before_nixl_takes_leave_of_it(pair: Pair) -> None:
    Hanging.call = "forget"
    batch = pair.read()
    assert reason_of(batch.outcome.result(60)) == "disconnected"
    assert Hanging.reached.wait(60)


def test_a_tier_whose_agent_does_not_end_says_so_and_ends_later(pair: Pair) -> None:
    wait_until(lambda: is_right(pair), "it reads", 60.0)
    Hanging.call = "close"
    assert not pair.tier.close(0.0)
    assert Hanging.reached.wait(60)
    behind = pair.read()
    assert behind.given_up is not None
    assert behind.outcome.done() or behind.given_up.result(60) == "unavailable"
    Hanging.released.set()
    assert reason_of(behind.outcome.result(60)) in ("closed", "unavailable")
