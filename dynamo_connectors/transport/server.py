"""Serves one worker's host rows to peers: the owner's machine, a socket, an agent, and the thread they live on."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from errno import EADDRINUSE
from functools import partial
from socket import SOCK_STREAM, getaddrinfo
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import zmq

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.hbm_rows import HbmRows
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.transport import channel
from dynamo_connectors.transport.agent import Agent, Region
from dynamo_connectors.transport.bell import Bell
from dynamo_connectors.transport.messages import (
    Ask,
    Codec,
    Grant,
    MessageError,
    Reply,
    Request,
    WindowPlace,
    WordsPlace,
)
from dynamo_connectors.transport.owner import DEFAULT_LEASE_SECONDS, Holdings, Offer, Owner, Shelf, Words
from dynamo_connectors.window import Window

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.25
_CLOSE_SECONDS = 5.0
#: Whom a grant can be sent to later. Others hear of it when they ask again.
_MOST_READERS = 4096


@dataclass(frozen=True)
class ServerSettings:
    host: str
    port: int
    namespace: bytes
    secret: bytes
    lease_seconds: float = DEFAULT_LEASE_SECONDS
    #: Readers may ask for any block that lies in host memory, not for exported ones alone.
    opens_shelf: bool = False


def _as_it_is(metadata: bytes) -> bytes:
    return metadata


class Served(NamedTuple):
    """The memory that peers may read, and how it is told to them."""

    regions: list[Region]
    base: int
    rows: int
    row_bytes: int
    holdings: Holdings
    #: NIXL's metadata -> what a welcome says.
    describe: Callable[[bytes], bytes] = _as_it_is
    #: Where blocks that nobody exported are found.
    shelf: Shelf | None = None
    window: Window | None = None
    #: Gets what is to be called when blocks have come.
    listen: Callable[[Callable[[], None]], None] | None = None
    #: Of the slots, for readers to look at. Without them readers ask.
    generations: npt.NDArray[np.uint64] | None = None


def host_rows(dram: DramStore, window: Window | None = None) -> Served:
    """`window`: rows in HBM that readers who have some as well read from."""
    dram.keep_places()
    region = Region(dram.rows.ctypes.data, dram.rows.nbytes)
    regions = [region] if window is None else [region, window.rows.region]
    place = regions, region.address, dram.capacity_blocks, dram.row_bytes
    return Served(*place, dram, shelf=dram, window=window, listen=dram.listen, generations=dram.generations)


class _Board:
    """Words of 8 bytes that readers look at, in memory that NIXL knows."""

    def __init__(self, generations: npt.NDArray[np.uint64], window_rows: int) -> None:
        # At random, so that no other process's memory at this address passes for it. It is counted up from there.
        self._run = np.array([int.from_bytes(os.urandom(8), "big") >> 3], dtype=np.uint64)
        self._window = np.zeros(window_rows, dtype=np.uint64)
        self._slots = generations

    @property
    def words(self) -> Words:
        return Words(self._run, self._window)

    @property
    def regions(self) -> list[Region]:
        return [Region(part.ctypes.data, part.nbytes) for part in (self._run, self._slots, self._window) if part.nbytes]

    @property
    def place(self) -> WordsPlace:
        return WordsPlace(*(part.ctypes.data for part in (self._run, self._slots, self._window)))


class PeerServer:
    """The engine's thread exports leases and hears how they ended; readers are served on a thread of its own."""

    def __init__(self, settings: ServerSettings, store: DramStore | Served) -> None:
        served = store if isinstance(store, Served) else host_rows(store)
        self._codec = Codec(settings.secret)
        epoch = os.urandom(8)
        self._window = served.window
        #: Fills of the window that have ended, and whether well.
        self._filled: queue.SimpleQueue[tuple[int, bool]] = queue.SimpleQueue()
        #: Reader -> where what it was not answered at once goes to.
        self._ways: OrderedDict[bytes, bytes] = OrderedDict()
        self._bell = Bell()
        self._lock = threading.Lock()
        self._stopping = False
        self._refused: Counter[tuple[str, str]] = Counter()
        self._told: frozenset[str] = frozenset()
        self._context: zmq.Context[Any] = zmq.Context()
        rows = 0 if served.window is None else served.window.rows.capacity_blocks
        self._board = None if served.generations is None else _Board(served.generations, rows)
        regions = served.regions + ([] if self._board is None else self._board.regions)
        try:
            self._socket = self._bind(settings)
            self._agent: Agent | None = Agent(f"dynamo-owner-{epoch.hex()}", regions)
        except BaseException:
            self._bell.close()
            self._context.destroy(linger=0)
            raise
        metadata = served.describe(self._agent.metadata)
        place = served.base, served.rows, served.row_bytes
        told = None if served.window is None else _told_of(served.window.rows)
        offer, words = Offer(epoch, settings.namespace, metadata, *place, told), None
        if self._board is not None:
            offer, words = offer._replace(words=self._board.place), self._board.words
        shelf = served.shelf if settings.opens_shelf else None
        self._owner = Owner(offer, served.holdings, settings.lease_seconds, shelf, words)
        if served.listen is not None:
            served.listen(self._bell.ring)
        self._thread = threading.Thread(target=self._serve, name="kvbm-peer-server", daemon=True)
        self._thread.start()

    def announce(self, lease: bytes) -> None:
        with self._lock:
            self._owner.announce(lease, time.monotonic())
        self._bell.ring()

    def export(self, lease: bytes, slots: Mapping[BlockKey, int]) -> None:
        """The slots are pinned until `take_ended` names the lease."""
        with self._lock:
            self._owner.export(lease, slots, time.monotonic())
        self._bell.ring()

    def isolate(self, namespace: bytes) -> None:
        """Serves nothing of what there was, and only readers with this namespace from now on."""
        with self._lock:
            self._owner.isolate(os.urandom(8), namespace)

    def take_ended(self) -> list[bytes]:
        with self._lock:
            return self._owner.take_ended()

    def take_counts(self) -> Counter[tuple[str, str]]:
        """What happened since the last call, by (what, label)."""
        with self._lock:
            counts = self._owner.counts + self._refused
            self._owner.counts.clear()
            self._refused.clear()
            return counts

    @property
    def open_leases(self) -> int:
        with self._lock:
            return self._owner.open_leases

    def close(self) -> bool:
        """False when the thread did not end in time; what it uses stays then. Idempotent."""
        self._stopping = True
        self._bell.ring()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            return False
        with self._lock:
            # Nothing is granted any more, and READs go on without us: in memory that is somebody else's soon.
            self._owner.revoke_all()
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        self._bell.close()
        self._context.destroy(linger=0)
        window, self._window = self._window, None
        return window is None or window.close()

    def check(self) -> None:
        with self._lock:
            self._owner.check()

    def _bind(self, settings: ServerSettings) -> zmq.Socket[Any]:
        socket: zmq.Socket[Any] = self._context.socket(zmq.ROUTER)
        self._monitor = channel.serve(socket, settings.secret)
        try:
            # By address: ZeroMQ takes a name here for that of a network card.
            address = str(getaddrinfo(settings.host, settings.port, type=SOCK_STREAM)[0][4][0])
            if ":" in address:
                socket.setsockopt(zmq.IPV6, 1)
            socket.bind(f"tcp://[{address}]:{settings.port}" if ":" in address else f"tcp://{address}:{settings.port}")
            #: Where readers find it; the system chooses a port when that of the settings is 0.
            self.port = int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])
        except (zmq.ZMQError, OSError) as error:
            # Stock vLLM's engine core outlives an API server that is killed.
            held = "a left-over process of a killed engine may hold it: end that (ss -ltnp names it), or "
            raise ConfigError(
                f"peers cannot be served at {settings.host}:{settings.port} ({error}); "
                f"{held if error.errno == EADDRINUSE else ''}choose another --kvbm-peer-port or --kvbm-peer-host"
            ) from None
        return socket

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(self._bell.fd, zmq.POLLIN)
        expiry = 0.0
        while not self._stopping:
            ready = dict(poller.poll(int(_TICK_SECONDS * 1000)))
            now = time.monotonic()
            try:
                if now >= expiry:
                    expiry = now + _TICK_SECONDS
                    with self._lock:
                        self._owner.expire(now)
                    self._tell()
                if self._monitor in ready:
                    for reason in channel.refusals(self._monitor):
                        self._refuse(reason, "a connection without the fleet's secret")
                if self._bell.fd in ready:
                    self._bell.hush()
                    self._pass_on_filled()
                self._answer_waiting(now)
                if self._socket in ready:
                    self._answer(now)
                self._start_fills()
            except Exception:
                log.exception("dynamo: peers could not be served for a moment")

    def _refuse(self, reason: str, what: object) -> None:
        with self._lock:
            # The label alone: counts are taken away, and a stranger shall not fill the log.
            first, self._told = reason not in self._told, self._told | {reason}
            self._refused["nixl_refused_messages", reason] += 1
        if first:
            log.warning("dynamo: a message to the peer port was refused (%s)", what)

    def _tell(self) -> None:
        """On the server's thread, a few times a second: for who wants to pass counts on."""

    def _heard(self, request: Request, reply: Reply | None) -> None:
        """Under the lock: for who wants to know what readers have been told."""

    def _answer(self, now: float) -> None:
        parts = self._socket.recv_multipart()
        try:
            if len(parts) != 2:
                raise MessageError("garbled", f"{len(parts)} parts")
            request = self._codec.request(parts[1])
        except MessageError as error:
            self._refuse(error.reason, error)
            return
        with self._lock:
            reply = self._owner.receive(request, now)
            self._heard(request, reply)
        if isinstance(request, Ask):
            self._ways.pop(request.reader, None)
            self._ways[request.reader] = parts[0]
            if len(self._ways) > _MOST_READERS:
                self._ways.popitem(last=False)
        if reply is not None:
            self._send(parts[0], reply)

    def _send(self, way: bytes, reply: Reply) -> None:
        # A reader that reads nothing loses answers, and asks again.
        with contextlib.suppress(zmq.Again):
            self._socket.send_multipart([way, self._codec.encode(reply)], zmq.NOBLOCK)

    def _start_fills(self) -> None:
        with self._lock:
            fills = self._owner.take_fills()
        for number, slots, rows in fills:
            assert self._window is not None, "a window is filled that is not there"
            self._window.fill(slots, rows, partial(self._end_fill, number))

    def _end_fill(self, number: int, is_good: bool) -> None:
        """On the window's thread."""
        self._filled.put((number, is_good))
        self._bell.ring()

    def _pass_on_filled(self) -> None:
        while True:
            try:
                number, is_good = self._filled.get_nowait()
            except queue.Empty:
                return
            with self._lock:
                grant = self._owner.filled(number, is_good)
            if grant is not None:
                self._tell_reader(grant)

    def _answer_waiting(self, now: float) -> None:
        with self._lock:
            grants = self._owner.answers(now)
        for grant in grants:
            self._tell_reader(grant)

    def _tell_reader(self, grant: Grant) -> None:
        if grant.reader in self._ways:
            self._send(self._ways[grant.reader], grant)


def _told_of(rows: HbmRows) -> WindowPlace:
    """What a welcome says of a window."""
    address, _, device = rows.region
    return WindowPlace(address, rows.capacity_blocks, -1 if device is None else device)
