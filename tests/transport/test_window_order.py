"""Copies that take their time: nothing is granted before its rows are filled, and no row is used before it was emptied.

The agents are stand-ins: READs are outside of every stream, so what counts is when they may begin.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from dynamo_kernels.block_view import BlockView

from dynamo_connectors.below import window_rows_of_a_read
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.config import PEER
from dynamo_connectors.errors import StoreError
from dynamo_connectors.hbm_rows import HbmRows
from dynamo_connectors.jobs import LoadItem
from dynamo_connectors.loads import LoadFromBelow
from dynamo_connectors.row_copy import RowCopy
from dynamo_connectors.staging import StagingRows
from dynamo_connectors.tiers.base import Batch, Place
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.transport import server as server_module
from dynamo_connectors.transport.agent import Region
from dynamo_connectors.transport.messages import Ask, Codec, Done, Grant, Hello, Reply, Request, Welcome
from dynamo_connectors.transport.server import PeerServer, ServerSettings, host_rows
from dynamo_connectors.transport.sockets import PeerSockets
from dynamo_connectors.window import Window

ROW_BYTES, SECRET, LEASE = 64, b"s", b"l" * 16
KEYS = [BlockKey(b"key%d" % number) for number in range(4)]
CPU = torch.device("cpu")


class QuietAgent:
    metadata = b"m"

    def __init__(self, name: str, regions: list[Region]) -> None: ...

    def close(self) -> None: ...


class Copies:
    """Copies from rows that wait until they may; `fails` instead, if asked to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_go, self.has_begun, self.fails = threading.Event(), threading.Event(), False
        really = RowCopy.up

        def up(copy: RowCopy, slots: Sequence[int], blocks: Sequence[int]) -> None:
            self.has_begun.set()
            assert self.may_go.wait(60)
            if self.fails:
                raise OSError("the GPU is gone")
            really(copy, slots, blocks)

        monkeypatch.setattr(RowCopy, "up", up)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[Copies]:
    copies = Copies(monkeypatch)
    yield copies
    copies.may_go.set()


class Talk:
    """An owner of four blocks with a window of three rows, and a reader that says what the test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server_module, "Agent", QuietAgent)
        self.dram = DramStore(4, ROW_BYTES)
        for slot, key in enumerate(KEYS):
            self.dram.write(slot, key, memoryview(bytes([slot + 1]) * ROW_BYTES))
        self.rows = HbmRows(3, ROW_BYTES, CPU)
        settings = ServerSettings("127.0.0.1", 0, b"n", SECRET, opens_shelf=True)
        self.server = PeerServer(settings, host_rows(self.dram, Window(self.dram, self.rows)))
        self._codec, self._sockets = Codec(SECRET), PeerSockets(SECRET)
        self._heard: list[Reply] = []
        self._peer = f"tcp://127.0.0.1:{self.server.port}"
        self.server.export(LEASE, {key: slot for slot, key in enumerate(KEYS)})
        welcome = self.ask(Hello(1, b"n", ROW_BYTES))
        assert isinstance(welcome, Welcome)
        assert welcome.window is not None
        assert (welcome.window.rows, welcome.window.device) == (3, -1)
        self.epoch = welcome.epoch

    def ask(self, request: Request) -> Reply:
        self._sockets.send(self._peer, self._codec.encode(request))
        return self.hear()

    def hear(self) -> Reply:
        deadline = time.monotonic() + 60
        while not self._heard:
            assert time.monotonic() < deadline, "nothing was said"
            self._heard += [self._codec.reply(frame) for _, frame in self._sockets.receive(0.5)]
        return self._heard.pop(0)

    def question(self, read: int, keys: Sequence[BlockKey]) -> Ask:
        return Ask(b"reader", read, self.epoch, LEASE, tuple(keys), 30.0, in_window=True)

    def holds(self, grant: Grant) -> bool:
        """As its reader sees it."""
        assert self.server._board is not None
        words = self.server._board.words.window
        return [int(words[row]) for row in grant.slots] == list(grant.generations)

    def end(self, grant: Grant) -> None:
        self._sockets.send(self._peer, self._codec.encode(Done(b"reader", grant.read, LEASE)))

    def close(self) -> None:
        self._sockets.close()
        assert self.server.close()
        self.dram.close()


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, copies: Copies) -> Iterator[Talk]:
    talk = Talk(monkeypatch)
    try:
        yield talk
    finally:
        copies.may_go.set()
        talk.close()


def granted(reply: Reply) -> Grant:
    assert isinstance(reply, Grant)
    return reply


def test_rows_are_granted_when_the_copy_into_them_is_complete_and_not_before(talk: Talk, copies: Copies) -> None:
    question = talk.question(1, KEYS[1:3])
    assert granted(talk.ask(question)).status == "pending"
    assert copies.has_begun.wait(60)
    assert granted(talk.ask(question)).status == "pending", "asked again it is no further"
    copies.may_go.set()
    grant = granted(talk.hear())  # it need not ask a third time
    assert grant.status == "granted"
    assert [int(talk.rows.rows[row][0]) for row in grant.slots] == [2, 3]
    assert talk.holds(grant)


def test_a_read_waits_for_rows_until_another_one_is_over(talk: Talk, copies: Copies) -> None:
    copies.may_go.set()
    assert granted(talk.ask(talk.question(1, KEYS[:2]))).status == "pending"
    first = granted(talk.hear())
    assert granted(talk.ask(talk.question(2, KEYS[2:]))).status == "pending"
    assert talk.holds(first)
    talk.end(first)
    second = granted(talk.hear())
    assert [int(talk.rows.rows[row][0]) for row in second.slots] == [3, 4]
    assert not talk.holds(first), "one of its rows serves the second"
    assert talk.holds(second)


@pytest.mark.parametrize("is_announced", [True, False])
def test_who_asks_early_is_told_when_lease_and_blocks_have_come(
    talk: Talk, copies: Copies, monkeypatch: pytest.MonkeyPatch, is_announced: bool
) -> None:
    monkeypatch.setattr(server_module, "_TICK_SECONDS", 3600.0)  # nobody looks from time to time
    copies.may_go.set()
    talk.dram.set_key(3, None)
    early = b"e" * 16
    if is_announced:
        talk.server.announce(early)
    question = Ask(b"reader", 1, talk.epoch, early, (KEYS[3],), 30.0, in_window=True)
    assert granted(talk.ask(question)).status == ("pending" if is_announced else "unknown")
    talk.dram.set_key(3, KEYS[3])
    if is_announced:
        talk.dram.tell_of_arrivals()
    else:
        talk.server.announce(early)
    told = [granted(talk.hear()) for _ in range(2)]  # once it is being filled, and when it is
    assert [grant.status for grant in told] == ["pending", "granted"]
    assert [int(talk.rows.rows[row][0]) for row in told[1].slots] == [4]


def test_a_server_that_is_closed_has_revoked_what_it_granted(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    assert talk.server._board is not None
    run, owner = talk.server._board.words.run, talk.server._owner
    before, revoke_all = int(run[0]), owner.revoke_all

    def revoke() -> None:
        assert not talk.server._thread.is_alive(), "it grants more after that"
        revoke_all()

    monkeypatch.setattr(owner, "revoke_all", revoke)
    assert talk.server.close()
    assert int(run[0]) != before, "READs may go on in memory that is given back now"


def test_rows_that_could_not_be_filled_are_not_granted(talk: Talk, copies: Copies) -> None:
    copies.fails = True
    copies.may_go.set()
    assert granted(talk.ask(talk.question(1, KEYS[:1]))).status == "pending"
    grant = granted(talk.hear())
    assert (grant.status, grant.slots) == ("granted", (-1,))


@pytest.mark.parametrize(
    ("rows", "blocks", "most"), [(476, 8, 16), (476, 64, 16), (476, 200, 50), (476, 4096, 59), (9, 64, 1)]
)
def test_a_load_is_several_reads_unless_it_is_small(rows: int, blocks: int, most: int) -> None:
    assert window_rows_of_a_read(rows, blocks) == most


class Tier:
    """Every READ is done at once."""

    def __init__(self) -> None:
        self.into: list[list[int]] = []

    def read(self, places: Sequence[Place], into: Sequence[int]) -> list[Batch]:
        self.into.append(list(into))
        outcome: Future[Sequence[StoreError | None]] = Future()
        outcome.set_result([None] * len(places))
        return [Batch(range(len(places)), outcome)]


def test_rows_are_read_into_again_when_they_have_been_emptied_and_not_before(copies: Copies) -> None:
    pages = np.zeros((8, ROW_BYTES), dtype=np.uint8)
    view = BlockView.of_pages([torch.from_numpy(pages)], [ROW_BYTES])
    staging, tier = StagingRows(HbmRows(2, ROW_BYTES, CPU), view), Tier()
    items = [LoadItem(key, PEER, 0, at) for at, key in enumerate(KEYS)]
    failed: dict[BlockKey, str] = {}
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(LoadFromBelow(tier, staging, 2, 2).run, items, 60.0, failed)
        assert copies.has_begun.wait(60)
        assert len(tier.into) == 1, "its rows are still being scattered"
        assert staging.take(1) == []
        copies.may_go.set()
        assert loaded.result(60) == 4
    assert tier.into == [[staging.view(0), staging.view(1)]] * 2
    assert not failed
    assert staging.take(4) == [0, 1], "a row is missing"
    staging.close()
