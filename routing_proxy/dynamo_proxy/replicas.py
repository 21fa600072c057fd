"""Several proxies before one fleet: each tells the others its own load, the prompts it sent, what it granted to keys
with limits and where it placed sessions, over UDP or Unix datagrams: two milliseconds after a placement, and every few
while anything else changes. Losing one loses its connections and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence

from .config import Replicas
from .engines import EngineRegistry
from .errors import ListenError
from .knowledge import Knowledge
from .ledger import Counts, Ledger
from .metrics import Metrics
from .replica_wire import Chain, Home, News, Order, parcels, sign, verify
from .sessions import Sessions
from .spending import Spending

_TELL_SECONDS = 0.015
# After a placement: what another proxy decides within this time does not know of it. In a replay through four proxies
# (benchmarks/router_rules.py, 2026-11-28) 20 ms cost 5 % of the mean first-token time, and 1 ms nothing.
_SOON_SECONDS = 0.002
_REPEAT_SECONDS = 0.5  # when nothing changes: so that the others know that we live
_SILENCE_SECONDS = 2.0  # then another proxy is taken for gone
_MAX_WAITING_CHAINS = 512  # between two turns
_DATAGRAMS_PER_TURN = 200
log = logging.getLogger("dynamo_proxy")


class ReplicaSync:
    """Our side of the talk between replicas."""

    def __init__(
        self, config: Replicas, registry: EngineRegistry, ledger: Ledger, knowledge: Knowledge, metrics: Metrics
    ) -> None:
        self._config = config
        self._registry = registry
        self._ledger = ledger
        self._knowledge = knowledge
        self._metrics = metrics
        self.spending: Spending | None = None  # None: no key has a limit
        self.sessions: Sessions | None = None  # None: requests of a session go where they like
        self._loop = asyncio.get_running_loop()
        self._name = secrets.token_hex(8)
        self._life = time.time_ns()
        self._number = 0
        self._order = Order()
        self._heard: dict[str, float] = {}  # other proxy -> when
        self._said: dict[str, Counts] = {}
        self._said_at = 0.0
        self._socket: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._soon: asyncio.TimerHandle | None = None
        self._chains: list[tuple[int, tuple[int, ...]]] = []  # sent to engines and not yet told

    @property
    def others(self) -> int:
        """How many other proxies are heard."""
        return len(self._heard)

    def start(self) -> None:
        """Bind and begin to tell. Raises ListenError."""
        family, address = _address(self._config.listen)
        if family == socket.AF_UNIX:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._config.listen.removeprefix("unix:"))
        self._socket = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.bind(address)
        except OSError as error:
            self._socket.close()
            self._socket = None
            raise ListenError(
                f"cannot listen for replicas on {self._config.listen} ({error}); choose another --replica-sync-listen"
            ) from None
        self._knowledge.on_sent = self._sent
        self._loop.add_reader(self._socket.fileno(), self._read)
        self._timer = self._loop.call_later(_TELL_SECONDS, self._turn)

    def close(self) -> None:
        for timer in (self._timer, self._soon):
            if timer is not None:
                timer.cancel()
        self._timer = self._soon = None
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
            if self._config.listen.startswith("unix:"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._config.listen.removeprefix("unix:"))
        self._knowledge.on_sent = None
        self._chains.clear()
        for name in list(self._heard):
            self._lost(name)

    def _turn(self) -> None:
        self._timer = self._loop.call_later(_TELL_SECONDS, self._turn)
        now = self._loop.time()
        for name, heard in list(self._heard.items()):
            if now - heard > _SILENCE_SECONDS:
                self._lost(name)
        self._tell(now)

    def _sent(self, slot: int, chain: tuple[int, ...]) -> None:
        """A request was placed: the others should know before they place theirs."""
        if chain and len(self._chains) < _MAX_WAITING_CHAINS:
            self._chains.append((slot, chain))
        if self._soon is None:
            self._soon = self._loop.call_later(_SOON_SECONDS, self._tell_soon)

    def _tell_soon(self) -> None:
        self._soon = None
        self._tell(self._loop.time())

    def _tell(self, now: float) -> None:
        loads = {engine.address.url: self._ledger.own(engine.slot) for engine in self._registry}
        repeat = now - self._said_at >= _REPEAT_SECONDS
        # An engine that left this proxy has no load of ours any more.
        loads.update({url: Counts() for url in self._said if url not in loads})
        changed = [(url, counts) for url, counts in loads.items() if repeat or self._said.get(url) != counts]
        waiting, self._chains = self._chains, []
        spent = self.spending.news(now) if self.spending is not None else []
        placed = self.sessions.take_news() if self.sessions is not None else {}
        if not changed and not waiting and not spent and not placed:
            return
        names = {engine.slot: engine.address.url for engine in self._registry}
        chains = [Chain(names[slot], nodes) for slot, nodes in waiting if slot in names]
        homes = [Home(session, names[slot]) for session, slot in placed.items() if slot in names]
        for parcel in parcels(changed, chains, spent, homes):
            self._number += 1
            news = News(self._name, self._life, self._number, time.time(), *parcel)
            self._send(sign(news, self._config.key))
        self._said = {url: counts for url, counts in loads.items() if any(counts) or url in names.values()}
        if repeat:
            self._said_at = now

    def _send(self, datagram: bytes) -> None:
        assert self._socket is not None
        for peer in self._config.peers:
            try:
                self._socket.sendto(datagram, _address(peer)[1])
            except OSError:  # nobody there, or its buffer is full: it will hear the next one
                self._metrics.replica_news.labels("not_sent").inc()

    def _read(self) -> None:
        for _ in range(_DATAGRAMS_PER_TURN):
            if self._socket is None:
                return
            try:
                datagram = self._socket.recv(65536)
            except (BlockingIOError, ConnectionError):  # a connection error tells of an earlier sendto
                return
            news = verify(datagram, self._config.key, time.time())
            if isinstance(news, str):
                self._metrics.replica_news.labels(news).inc()
            elif news.sender == self._name:
                continue
            elif not self._order.is_new(news):
                self._metrics.replica_news.labels("out_of_order").inc()
            else:
                self._apply(news)

    def _apply(self, news: News) -> None:
        now = self._loop.time()
        if news.sender not in self._heard:
            log.info("replica %s is heard", news.sender)
            self._said_at = 0.0  # it may be new: tell it everything
            if self.spending is not None:
                self.spending.tell_all()
        self._heard[news.sender] = now
        slots = {engine.address.url: engine.slot for engine in self._registry}
        for url, counts in news.loads:
            if url in slots:
                self._ledger.told(news.sender, slots[url], counts)
        for url, nodes in news.chains:
            if url in slots:
                self._knowledge.approx.insert(slots[url], nodes, now)
        if news.spent and self.spending is not None:
            self.spending.told(news.sender, news.spent, now)
        if news.homes and self.sessions is not None:
            self._hear_homes(self.sessions, news.homes, slots, now)
        self._metrics.replica_news.labels("applied").inc()

    @staticmethod
    def _hear_homes(sessions: Sessions, homes: Sequence[Home], slots: Mapping[str, int], now: float) -> None:
        """Two that placed a session at once agree on one engine: that whose address comes first."""
        urls = {slot: url for url, slot in slots.items()}
        for session, url in homes:
            if url in slots:
                here = sessions.slot(session, now)
                if here is None or urls.get(here, url) >= url:
                    sessions.told(session, slots[url], now)

    def _lost(self, name: str) -> None:
        log.info("replica %s is no longer heard", name)
        self._heard.pop(name, None)
        self._ledger.forget_proxy(name)
        if self.spending is not None:
            self.spending.forget(name)

    def check(self) -> None:
        assert self.spending is None or set(self.spending.proxies) <= set(self._heard), "spending of a proxy not heard"
        assert set(self._ledger.proxies) <= set(self._heard), "loads of a proxy that is not heard"
        assert self._socket is None or self._knowledge.on_sent == self._sent, "nobody hears what was sent"
        assert len(self._chains) <= _MAX_WAITING_CHAINS, f"{len(self._chains)} chains wait to be told"
        assert not self._chains or self._soon is not None, "chains wait to be told and nobody will"


def _address(text: str) -> tuple[int, str | tuple[str, int]]:
    if text.startswith("unix:"):
        return socket.AF_UNIX, text.removeprefix("unix:")
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, int(port))
