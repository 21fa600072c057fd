"""SGLang's pages over real NIXL: what arrives is what was offered, or the room has failed on both sides."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.sglang.handoff_layout import METADATA_KEY, EngineLayout, layout_of, page_key
from dynamo_connectors.sglang.handoff_metrics import HandoffMeter
from dynamo_connectors.sglang.handoff_wire import (
    DELIVERED,
    OFFERED,
    WAITING,
    WANTED,
    PageReader,
    PageServer,
    RoomRead,
    lease_of,
)
from dynamo_connectors.transport.messages import Ask, Check, Codec, Grant, Hello, Reply, Verdict, Welcome
from dynamo_connectors.transport.owner import _MOST_REMEMBERED as _REMEMBERED
from dynamo_connectors.transport.peer_tier import PeerSettings
from dynamo_connectors.transport.server import ServerSettings
from dynamo_connectors.transport.sockets import PeerSockets
from dynamo_connectors.transport.tickets import Ticket

_PAGES, _ROWS, _PAGE_BYTES, _ROW_BYTES = 32, 4, 4096, 64
_ROOM = 4711
_LAYERS = 3


class Engine:
    """Its memory: `_LAYERS` buffers of pages, one of metadata."""

    def __init__(self, seed: int, row_bytes: int = _ROW_BYTES) -> None:
        random = np.random.default_rng(seed)
        self.pages = random.integers(0, 256, (_LAYERS, _PAGES, _PAGE_BYTES), dtype=np.uint8)
        self.rows = random.integers(0, 256, (_ROWS, row_bytes), dtype=np.uint8)
        layers = [(layer.ctypes.data, layer.nbytes, _PAGE_BYTES) for layer in self.pages]
        self.layout: EngineLayout = layout_of(layers, [(self.rows.ctypes.data, self.rows.nbytes, row_bytes)])

    def slots(self, pages: list[int], row: int) -> dict[BlockKey, int]:
        slots = {page_key(position): page for position, page in enumerate(pages)}
        return slots | {METADATA_KEY: self.layout.metadata_slot(row)}


class Pair:
    def __init__(self, reader_engine: Engine, secret: bytes = b"s", namespace: bytes = b"n") -> None:
        self.prefill, self.decode = Engine(1), reader_engine
        self.registry = CollectorRegistry()
        meter = HandoffMeter(self.registry)
        self.server = PageServer(ServerSettings("127.0.0.1", 0, b"n", b"s", 10.0), self.prefill.layout, meter)
        settings = PeerSettings(0, namespace, self.decode.layout.row_bytes, secret, deadline_seconds=4.0)
        self.reader = PageReader(settings, self.decode.layout, meter)
        self.lease = lease_of(_ROOM)
        self.ticket = Ticket("127.0.0.1", self.server.port, self.lease)

    def read(self, pages: list[int], row: int = 0) -> RoomRead:
        (read,) = self.reader.read_room(self.ticket, self.decode.slots(pages, row))
        return read

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"dynamo_nixl_{name}", labels) or 0.0

    def state(self) -> str | None:
        return self.server.look(self.lease)[0]

    def close(self) -> None:
        assert self.reader.close(time.monotonic() + 30)
        assert self.server.close()
        self.server.check()


@pytest.fixture
def pairs() -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(reader_engine: Engine | None = None, **options: bytes) -> Pair:
        made.append(Pair(reader_engine or Engine(2), **options))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_a_room_from_its_opening_to_its_end(pairs: Callable[..., Pair]) -> None:
    pair = pairs()
    pair.server.open_room(pair.lease)
    assert pair.state() == WAITING
    read = pair.read([7, 8, 9, 3], row=2)
    until(lambda: pair.state() == WANTED)
    assert not read.is_decided
    pair.server.offer(pair.lease, pair.prefill.slots([1, 2, 3, 30], row=1))
    until(lambda: read.has_ended)
    assert read.failure is None
    assert pair.state() == DELIVERED
    assert (pair.decode.pages[:, [7, 8, 9, 3]] == pair.prefill.pages[:, [1, 2, 3, 30]]).all()
    assert (pair.decode.rows[2] == pair.prefill.rows[1]).all()
    untouched = [page for page in range(_PAGES) if page not in (7, 8, 9, 3)]
    assert (pair.decode.pages[:, untouched] == Engine(2).pages[:, untouched]).all()
    until(lambda: pair.metric("read_blocks_total") == 5 and pair.metric("open_leases") == 1)
    assert pair.metric("read_bytes_total") > 0
    assert pair.metric("reads_total") == 1
    pair.server.close_room(pair.lease)
    until(lambda: pair.metric("leases_ended_total", reason="revoked") == 1)
    assert pair.metric("open_leases") == 0


def test_prefill_may_take_longer_than_the_deadline(pairs: Callable[..., Pair]) -> None:
    pair = pairs()
    pair.server.open_room(pair.lease)
    read = pair.read([0])
    time.sleep(6)  # the deadline is 4 s: what is counted is silence, and prefill is not silent
    assert not read.is_decided
    pair.server.offer(pair.lease, pair.prefill.slots([5], 0))
    until(lambda: read.has_ended)
    assert read.failure is None


def test_a_reader_that_comes_before_the_request_waits_for_it(pairs: Callable[..., Pair]) -> None:
    pair = pairs()
    read = pair.read([0])
    time.sleep(1.5)
    pair.server.open_room(pair.lease)
    pair.server.offer(pair.lease, pair.prefill.slots([5], 0))
    until(lambda: read.has_ended)
    assert read.failure is None


def test_an_aborted_room_fails_the_other_side_at_once(pairs: Callable[..., Pair]) -> None:
    pair = pairs()
    pair.server.open_room(pair.lease)
    read = pair.read([0])
    until(lambda: pair.state() == WANTED)
    pair.server.close_room(pair.lease)
    until(lambda: read.has_ended)
    assert read.failure == "gone"


def test_a_reader_that_wants_no_more_ends_the_room(pairs: Callable[..., Pair]) -> None:
    pair = pairs()
    pair.server.open_room(pair.lease)
    pair.reader.watch(pair.ticket)
    read = pair.read([0])
    until(lambda: pair.state() == WANTED)
    pair.reader.abandon(pair.ticket)
    until(lambda: read.has_ended)
    assert read.failure == "unwanted"
    until(lambda: pair.server.look(pair.lease) == (None, "done"))


def test_a_room_serves_one_request_only(pairs: Callable[..., Pair]) -> None:
    pair = pairs()
    pair.server.open_room(pair.lease)
    pair.server.close_room(pair.lease)
    pair.server.open_room(pair.lease)
    pair.server.offer(pair.lease, pair.prefill.slots([5], 0))
    assert pair.state() is None
    read = pair.read([0])
    until(lambda: read.has_ended)
    assert read.failure == "gone"


def test_another_number_of_pages_is_a_failure_on_both_sides(pairs: Callable[..., Pair]) -> None:
    pair = pairs()
    pair.server.open_room(pair.lease)
    read = pair.read([0, 1])
    pair.server.offer(pair.lease, pair.prefill.slots([5], 0))
    until(lambda: read.has_ended)
    assert read.failure == "gone"


def test_fewer_pages_than_were_offered_are_no_delivery(pairs: Callable[..., Pair]) -> None:
    pair = pairs()
    pair.server.open_room(pair.lease)
    pair.server.offer(pair.lease, pair.prefill.slots([5, 6, 7], 0))
    read = pair.read([0])
    until(lambda: read.has_ended)
    assert pair.state() == OFFERED


def test_a_stranger_and_another_model_get_nothing(pairs: Callable[..., Pair]) -> None:
    for options in ({"secret": b"another"}, {"namespace": b"another"}):
        pair = pairs(**options)
        pair.server.open_room(pair.lease)
        pair.server.offer(pair.lease, pair.prefill.slots([5], 0))
        read = pair.read([0])
        until(lambda read=read: read.has_ended)
        assert read.failure in ("unreachable", "refused")
        assert (pair.decode.pages == Engine(2).pages).all()


def test_other_metadata_is_refused_before_the_first_read(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Engine(2, row_bytes=_ROW_BYTES * 2))
    pair.server.open_room(pair.lease)
    pair.server.offer(pair.lease, pair.prefill.slots([5], 0))
    read = pair.read([0])
    until(lambda: read.has_ended)
    assert read.failure == "refused"


def test_a_slot_beyond_the_engine_is_not_written(pairs: Callable[..., Pair]) -> None:
    pair = pairs()
    pair.server.open_room(pair.lease)
    pair.server.offer(pair.lease, pair.prefill.slots([5], 0))
    (read,) = pair.reader.read_room(pair.ticket, {page_key(0): pair.decode.layout.slots + 1, METADATA_KEY: _PAGES})
    until(lambda: read.has_ended)
    assert read.failure == "internal_error"
    assert (pair.decode.pages == Engine(2).pages).all()


def test_a_room_that_is_open_stays_its_request_s(pairs: Callable[..., Pair]) -> None:
    pair = pairs()
    assert pair.server.open_room(pair.lease)
    pair.server.offer(pair.lease, pair.prefill.slots([5], 0))
    assert not pair.server.open_room(pair.lease)
    assert pair.state() == OFFERED
    pair.server.close_room(pair.lease)
    assert pair.server.open_room(pair.lease), "its number is free, though its lease is spent"


@pytest.fixture
def talk() -> Iterator[Callable[[Pair, Ask | Check], Reply]]:
    """A reader's words without a reader."""
    sockets, codec = PeerSockets(b"s"), Codec(b"s")

    def say(pair: Pair, request: Hello | Ask | Check) -> Reply:
        sockets.send(f"tcp://127.0.0.1:{pair.server.port}", codec.encode(request))
        heard: list[tuple[str, bytes]] = []
        until(lambda: bool(heard.extend(sockets.receive(0.1)) or heard))
        return codec.reply(heard[0][1])

    yield say
    sockets.close()


def granted(pair: Pair, talk: Callable[..., Reply], pages: int) -> Check:
    """What a reader asks that has read so many pages, and the metadata."""
    welcome = talk(pair, Hello(1, b"n", pair.decode.layout.row_bytes))
    assert isinstance(welcome, Welcome)
    keys = (*map(page_key, range(pages)), METADATA_KEY)
    grant = talk(pair, Ask(b"r", 1, welcome.epoch, pair.lease, keys, 4.0))
    assert isinstance(grant, Grant)
    assert grant.status == "granted"
    return Check(b"r", 1, welcome.epoch, pair.lease, grant.slots, grant.generations)


def test_a_question_that_comes_twice_delivers_nothing_twice(
    pairs: Callable[..., Pair], talk: Callable[..., Reply]
) -> None:
    pair = pairs()
    pair.server.open_room(pair.lease)
    pair.server.offer(pair.lease, pair.prefill.slots([5, 6, 7], 0))
    part = granted(pair, talk, 1)
    for _ in range(2):
        verdict = talk(pair, part)
        assert isinstance(verdict, Verdict)
        assert verdict.held
    assert pair.state() == OFFERED


def test_a_room_s_next_life_does_not_vouch_for_its_last_one(
    pairs: Callable[..., Pair], talk: Callable[..., Reply]
) -> None:
    pair = pairs()
    pair.server.open_room(pair.lease)
    pair.server.offer(pair.lease, pair.prefill.slots([5], 0))
    late = granted(pair, talk, 1)
    pair.server.close_room(pair.lease)
    for room in range(1, _REMEMBERED + 1):  # so many that it is forgotten
        pair.server.open_room(lease_of(_ROOM + room))
        pair.server.close_room(lease_of(_ROOM + room))
    pair.server.open_room(pair.lease)
    pair.server.offer(pair.lease, pair.prefill.slots([5], 0))
    verdict = talk(pair, late)
    assert isinstance(verdict, Verdict)
    assert not verdict.held
    assert pair.state() == OFFERED
