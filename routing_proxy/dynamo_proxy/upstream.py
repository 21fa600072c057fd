"""Connections to one engine: a keep-alive pool, and the protocol that carries one response at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from abc import ABC, abstractmethod
from typing import cast

from .config import EngineAddress, Limits, Timeouts
from .errors import ProtocolError
from .http1 import EndOfMessage, ResponseReader
from .http_heads import ResponseHead
from .last_resort import TOLD, end_request, guarded

log = logging.getLogger("dynamo_proxy")


class ResponseSink(ABC):
    """Who receives one response. Exactly one of on_end, on_lost, on_late and on_fault is the last call."""

    __slots__ = ()

    @abstractmethod
    def on_dialled(self, connection: UpstreamConnection | None, reason: str) -> None: ...
    @abstractmethod
    def on_head(self, head: ResponseHead) -> None: ...
    @abstractmethod
    def on_body(self, data: bytes) -> None: ...
    @abstractmethod
    def on_end(self) -> None: ...
    @abstractmethod
    def on_lost(self, reason: str) -> None: ...
    @abstractmethod
    def seconds_left(self) -> float:
        """How long what comes next may still take."""

    @abstractmethod
    def on_late(self) -> None: ...
    @abstractmethod
    def on_fault(self) -> None: ...


class UpstreamConnection(asyncio.Protocol):
    """One connection to an engine. Idle in the pool, or busy with one response.

    Its timer outlives responses: nothing is armed or cancelled per request. It comes no later than the soonest deadline
    that any response may have, asks how much is left, and sleeps on.
    """

    __slots__ = ("_loop", "_pool", "_timer", "idle_since", "reader", "sink", "transport")

    def __init__(self, pool: UpstreamPool) -> None:
        self._pool = pool
        self._loop = pool.loop
        self.transport: asyncio.Transport | None = None
        self.idle_since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        # per response
        self.sink: ResponseSink | None = None
        self.reader: ResponseReader | None = None

    @property
    def is_open(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    @property
    def answers(self) -> bool:
        """True if the response under way has begun."""
        return self.reader is not None and self.reader.started

    def begin(self, sink: ResponseSink, reader: ResponseReader, request: bytes) -> None:
        """Send a request; its response goes to `sink`."""
        assert self.transport is not None, "the connection is not open"
        assert self.sink is None, "the connection is not free"
        self.sink, self.reader = sink, reader
        self.transport.write(request)
        if self._timer is None:
            self._timer = self._loop.call_later(self._pool.soonest_seconds, self._on_timer)

    def abandon(self) -> None:
        """Drop the response under way and the connection with it: the engine sees it and aborts the
        request.
        """
        self.sink = None
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        no_delay(transport)

    def data_received(self, data: bytes) -> None:
        sink, reader = self.sink, self.reader
        if sink is None or reader is None:
            self.abandon()  # bytes nobody asked for
            return
        try:  # as `guarded`, without its calls: every event of a stream passes here
            self._read(sink, reader, data)
        except Exception:
            log.exception(TOLD)
            end_request(sink)

    def _read(self, sink: ResponseSink, reader: ResponseReader, data: bytes) -> None:
        body = reader.whole(data)
        if body is not None:
            sink.on_body(body)
            return
        try:
            for event in reader.feed(data):
                if isinstance(event, bytes):
                    sink.on_body(event)
                elif isinstance(event, EndOfMessage):
                    self._end(event)
                else:
                    sink.on_head(event)
                if self.sink is not sink:
                    return
        except ProtocolError:
            self._lost("bad_response")

    def _on_timer(self) -> None:
        self._timer = None
        if self.sink is not None:
            guarded(self.sink, self._look, self.sink)

    def _look(self, sink: ResponseSink) -> None:
        """Is the response late?"""
        left = sink.seconds_left()
        if left > 0:
            self._timer = self._loop.call_later(min(left, self._pool.soonest_seconds), self._on_timer)
        else:
            sink.on_late()

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pool.closed(self)
        if self.sink is not None and self.reader is not None:
            guarded(self.sink, self._closed, self.reader, error)

    def _closed(self, reader: ResponseReader, error: Exception | None) -> None:
        if error is None and reader.eof():
            self._end(EndOfMessage(False))
        else:
            self._lost("connection_lost")

    def check(self) -> None:
        assert (self.sink is None) or (self.reader is not None), "a response without a reader"
        assert (self.sink is None) or (self._timer is not None), "a response without a deadline"
        if self.reader is not None and self.sink is not None:
            self.reader.check()

    def _end(self, event: EndOfMessage) -> None:
        sink, self.sink, self.reader = self.sink, None, None
        assert sink is not None
        transport = self.transport
        if event.reusable and transport is not None and not transport.is_closing():
            if transport.get_write_buffer_size():  # answered early: the rest of the request is in the way
                transport.abort()
            else:
                self._pool.put(self)
        elif transport is not None:
            transport.close()
        sink.on_end()

    def _lost(self, reason: str) -> None:
        sink = self.sink
        self.abandon()
        if sink is not None:
            sink.on_lost(reason)


class UpstreamPool:
    """Open connections to one engine. Idle ones are used last in, first out, and for a few seconds only."""

    def __init__(
        self, address: EngineAddress, timeouts: Timeouts, limits: Limits, tls: ssl.SSLContext | None = None
    ) -> None:
        self.address = address
        self._tls = tls if address.tls else None
        self.loop = asyncio.get_running_loop()
        self.soonest_seconds = timeouts.soonest_seconds
        self._timeouts = timeouts
        self._limits = limits
        self._idle: list[UpstreamConnection] = []
        self._open: set[UpstreamConnection] = set()
        self._dials: set[asyncio.Task[None]] = set()

    def take(self, now: float) -> UpstreamConnection | None:
        """An idle connection, or None: then dial. Connections idle too long are closed on the way."""
        oldest = now - self._timeouts.upstream_keep_alive_seconds
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and connection.idle_since >= oldest:
                return connection
            connection.abandon()
        return None

    def put(self, connection: UpstreamConnection) -> None:
        connection.idle_since = self.loop.time()
        self._idle.append(connection)

    def dial(self, sink: ResponseSink) -> asyncio.Task[None]:
        """Open a connection; `sink` gets it, or None and the reason. Cancel the task to give up."""
        task = self.loop.create_task(self._dial(sink))
        self._dials.add(task)
        task.add_done_callback(self._dials.discard)
        return task

    async def _dial(self, sink: ResponseSink) -> None:
        connection = UpstreamConnection(self)
        reason = ""
        try:
            await asyncio.wait_for(
                self.loop.create_connection(lambda: connection, self.address.host, self.address.port, ssl=self._tls),
                self._timeouts.connect_seconds,
            )
        except asyncio.CancelledError:
            connection.abandon()
            raise
        except asyncio.TimeoutError:  # not yet a TimeoutError in Python 3.10
            reason = "connect_timeout"
        except ssl.SSLError:
            reason = "tls_failed"
        except OSError:
            reason = "connect_failed"
        if connection.is_open:  # only now: uvloop makes connections whose dial was cancelled, and never loses them
            self._open.add(connection)
        guarded(sink, sink.on_dialled, None if reason else connection, reason)

    def closed(self, connection: UpstreamConnection) -> None:
        self._open.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    async def close(self) -> None:
        """Close every connection; requests under way are lost."""
        for task in list(self._dials):
            task.cancel()
        for connection in list(self._open):
            connection.abandon()
        if self._dials:
            await asyncio.gather(*self._dials, return_exceptions=True)
        self._idle.clear()

    def check(self) -> None:
        assert len(set(map(id, self._idle))) == len(self._idle), "a connection is idle twice"
        for connection in self._open:
            connection.check()
        for connection in self._idle:
            assert connection.sink is None, "an idle connection has a response under way"
            assert connection in self._open, "an idle connection is not open"


def no_delay(transport: asyncio.BaseTransport) -> None:
    """Send small writes at once (tokens are small writes)."""
    raw = transport.get_extra_info("socket")
    if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
