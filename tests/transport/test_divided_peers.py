"""A block whose parts are read from several ranks: it ends with the last of them, and is missed with any."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import ConfigError, StoreError
from dynamo_connectors.head_map import Piece
from dynamo_connectors.tiers.base import Place
from dynamo_connectors.transport import divided_peers
from dynamo_connectors.transport.agent import Region
from dynamo_connectors.transport.divided_peers import Divide, DividedPeerTier, _Together
from dynamo_connectors.transport.peer_tier import Call, PeerSettings, PeerTier
from dynamo_connectors.transport.tickets import Ticket
from tests.vllm.client import wait_until

KEYS = [BlockKey(b"a"), BlockKey(b"b")]


def joined() -> tuple[Call, Call, Call]:
    call, *parts = (Call(KEYS, [0, 8]) for _ in range(3))
    _Together(call, parts)
    return call, parts[0], parts[1]


def test_a_block_counts_when_every_part_has_come() -> None:
    call, one, other = joined()
    one.outcome.set_result([None, None])
    assert not call.outcome.done(), "its buffers are in use"
    stale = StoreError("stale", "")
    other.outcome.set_result([None, stale])
    assert list(call.outcome.result()) == [None, stale]
    assert not call.given_up.done()


def test_nobody_waits_for_the_rest_of_a_block_that_will_not_come_whole() -> None:
    call, one, other = joined()
    other.given_up.set_result("unreachable")
    one.given_up.set_result("unavailable")
    assert call.given_up.result() == "unreachable"
    assert not call.outcome.done(), "late bytes may still come"
    for part in (one, other):
        part.end("timeout", "")
    assert [error.reason for error in call.outcome.result() if error] == ["timeout", "timeout"]


class NoAgent(PeerTier):
    """The second one finds nothing left of what NIXL needs."""

    made: ClassVar[list[PeerTier]] = []

    def __init__(self, *args: Any) -> None:
        if self.made:
            raise ConfigError("NIXL has nothing left")
        super().__init__(*args)
        self.made.append(self)


HALVES = [
    PeerSettings(at, b"n", 2048, b"s", parts=(Piece(0, at * 2048, 2048),), quarantine_bytes=1 << 20) for at in range(2)
]


@contextmanager
def reading(divide: Divide) -> Iterator[tuple[DividedPeerTier, Callable[[Ticket], list[str]]]]:
    """A tier of one worker, and why a block of that ticket is missing."""
    rows = np.zeros((2, 4096), dtype=np.uint8)
    tier = DividedPeerTier(PeerSettings(0, b"n", 4096, b"s"), [Region(rows.ctypes.data, rows.nbytes)], divide)

    def read(ticket: Ticket) -> list[str]:
        (batch,) = tier.read([Place(BlockKey(b"k"), 0, BlockKey(ticket.encode()))], [memoryview(rows[0])])
        return [error.reason for error in batch.outcome.result(60.0) if error]

    try:
        yield tier, read
        tier.check()
    finally:
        assert tier.close(time.monotonic() + 30)


def ticket_of(workers: int) -> Ticket:
    return Ticket("127.0.0.1", 9, b"l" * 16, workers)


def test_an_agent_that_cannot_be_made_costs_the_blocks_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever of the other ranks has been met already ends at once (the house looks for its threads and sockets)."""
    monkeypatch.setattr(divided_peers, "PeerTier", NoAgent)
    with reading(lambda ranks: HALVES) as (tier, read):
        tier.watch(ticket_of(2))
        assert read(ticket_of(2)) == ["refused"]
        assert tier.take_counts()["nixl_refused_peers", "no_agent"] == 1
    assert len(NoAgent.made) == 1
    assert NoAgent.made[0]._closed


def test_after_a_reset_no_rank_is_met_any_more() -> None:
    with reading(lambda ranks: HALVES) as (tier, read):
        tier.watch(ticket_of(2))
        tier.isolate(b"weights that nobody else has")
        readers = tier._others[2]
        told = [b"weights that nobody else has"] * 2
        wait_until(lambda: [reader._reader._common.namespace for reader in readers] == told, "they have heard of it")
        assert read(ticket_of(4)) == ["refused"], "nor ranks of another engine"
