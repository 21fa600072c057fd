"""One client's connection: reads requests in order, hands each to the front end, writes its answer. Thin on
purpose.
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
from typing import Protocol, cast

import orjson

from .config import Limits, Timeouts
from .errors import ProtocolError
from .flow_control import FlowControl
from .http1 import Request, RequestReader
from .http_heads import RequestHead
from .upstream import no_delay

_REASONS = {
    200: b"OK", 400: b"Bad Request", 401: b"Unauthorized", 403: b"Forbidden", 404: b"Not Found",
    405: b"Method Not Allowed", 408: b"Request Timeout", 413: b"Content Too Large", 417: b"Expectation Failed",
    429: b"Too Many Requests", 431: b"Request Header Fields Too Large", 500: b"Internal Server Error",
    501: b"Not Implemented", 502: b"Bad Gateway", 503: b"Service Unavailable", 504: b"Gateway Timeout",
    505: b"HTTP Version Not Supported",
}  # fmt: skip
_LINGER_SECONDS = 5.0
# What a client must send on average, beyond its idle time: slower ones hold a connection for nothing.
_MIN_BYTES_PER_SECOND = 4096
_LINGER_BYTES = 256 << 20
_JSON = b"application/json"


def error_body(status: int, code: str, message: str) -> bytes:
    """An error in the shape that OpenAI clients read."""
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    return orjson.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})


class Running(Protocol):
    """A request that somebody else works on."""

    def abort(self, status: int, reason: str) -> None: ...
    def check(self) -> None: ...


class FrontEnd(Protocol):
    """Who answers requests. `handle` returns what runs, or None if it answered at once."""

    def handle(self, client: ClientConnection, request: Request) -> Running | None: ...
    def rejected(self, error: ProtocolError) -> None: ...
    def opened(self, client: ClientConnection) -> None: ...
    def closed(self, client: ClientConnection) -> None: ...


class ClientConnection(asyncio.Protocol):
    """Protocol of one client connection. One request at a time; pipelined ones wait in the reader."""

    def __init__(self, front_end: FrontEnd, limits: Limits, timeouts: Timeouts) -> None:
        # for the connection
        self._front_end = front_end
        self._limits = limits
        self._timeouts = timeouts
        self.loop = asyncio.get_running_loop()
        self._reader = RequestReader(limits)
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._heard = 0.0
        self._began = 0.0  # when the first byte came of the request that is coming in
        self._came_bytes = 0  # of that request
        self._closing_soon = False
        self._discarding = False
        self._unread = (0, 0)
        self._pumping = False
        self.flow: FlowControl
        # for the request under way
        self._running: Running | None = None
        self._busy = False
        self._keep_alive = True
        self._is_head_request = False

    # --- transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        no_delay(transport)
        self.flow = FlowControl(self._transport, self._limits.high_water_bytes)
        self._heard = self.loop.time()
        self._timer = self.loop.call_later(self._timeouts.client_idle_seconds, self._on_timer)
        self._front_end.opened(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._transport = None
        running, self._running = self._running, None
        self._busy = False
        self._front_end.closed(self)
        if running is not None:
            running.abort(499, "client_gone")

    def eof_received(self) -> bool:
        return False  # a client that half-closes is taken as gone: an engine must not work for nobody

    def pause_writing(self) -> None:
        self.flow.pause_writing()

    def resume_writing(self) -> None:
        self.flow.resume_writing()
        if not self._busy:
            self.loop.call_soon(self._pump)

    def data_received(self, data: bytes) -> None:
        self._heard = self.loop.time()
        if not self._busy and not self._discarding and not self._reader.mid_request:
            self._began, self._came_bytes = self._heard, 0
        self._came_bytes += len(data)
        if self._discarding:
            if self._came_bytes > _LINGER_BYTES:
                self.cut()
            return
        if not self._must_wait():
            request = self._reader.whole(data)
            if request is not None:
                self._begin(request)
                return
        self._reader.receive(data)
        if not self._busy:
            self._pump()
        if self._must_wait() and self._reader.held_bytes > self._limits.pipeline_bytes:
            self.flow.hold_client(True)

    def _must_wait(self) -> bool:
        """True while no request may begin: one is under way, or its client does not read its answers."""
        return self._busy or self.flow.writing_paused

    def _on_timer(self) -> None:
        """Idle between requests, too slow in sending one, or not reading its answer (re-armed lazily)."""
        self._timer = None
        assert self._transport is not None
        now = self.loop.time()
        limit = _LINGER_SECONDS if self._discarding else self._timeouts.client_idle_seconds
        before, self._unread = self._unread, (self._transport.get_write_buffer_size(), self.flow.resumes)
        coming = self._discarding or self._reader.mid_request
        since = self._began + self._came_bytes / _MIN_BYTES_PER_SECOND if coming else self._heard
        left = limit if self._busy else min(since + limit - now, limit)
        if self._unread[0] and (self.flow.writing_paused or left <= 0):
            if self._unread == before:
                self._transport.abort()  # nothing was read since the last look
                return
            left = limit
        if left > 0:
            self._timer = self.loop.call_later(left, self._on_timer)
        elif self._reader.mid_request and not self._discarding:
            self.refuse(408, "request_timeout", "the rest of the request did not come in time", close=True)
        else:
            self._transport.abort()

    # --- requests

    def _pump(self) -> None:
        """Take requests from the reader until one is under way or more bytes are needed."""
        if self._pumping:
            return  # an answer given at once must not recurse
        self._pumping = True
        try:
            while not self._must_wait() and self._transport is not None and not self._discarding:
                event = self._reader.next_event()
                if event is None:
                    break
                if isinstance(event, RequestHead):
                    if event.expect_continue:
                        self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                else:
                    self._begin(event)
        except ProtocolError as error:
            self._front_end.rejected(error)
            self._busy, self._is_head_request = True, False
            self.refuse(error.status, error.code, str(error), close=True)
        finally:
            self._pumping = False
        if not self._must_wait() and not self._discarding:
            self.flow.hold_client(False)

    def _begin(self, request: Request) -> None:
        self._busy = True
        self._keep_alive = request.head.keep_alive and not self._closing_soon
        self._is_head_request = request.head.method == b"HEAD"
        running = self._front_end.handle(self, request)
        if self._busy:
            self._running = running

    # --- answers

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def reply(self, status: int, body: bytes, content_type: bytes = _JSON, extra: bytes = b"") -> None:
        """Write a whole answer of our own and go on."""
        keep = self._keep_alive and not self._closing_soon
        head = b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b%b\r\n" % (
            status, _REASONS.get(status, b"Unknown"), content_type, len(body), extra,
            b"" if keep else b"connection: close\r\n",
        )  # fmt: skip
        self.write(head if self._is_head_request else head + body)
        self.finish(keep)

    def refuse(
        self, status: int, code: str, message: str, close: bool = False, wait_seconds: float = 2, allow: bytes = b""
    ) -> None:
        """Answer with an error in the shape OpenAI clients read."""
        if close:
            self._keep_alive = False
        body = error_body(status, code, message)
        wait = b"retry-after: %d\r\n" % max(1, math.ceil(wait_seconds)) if status in (429, 503) else b""
        if allow:
            wait += b"allow: %b\r\n" % allow
        self.reply(status, body, extra=wait)

    def finish(self, keep_alive: bool) -> None:
        """The answer is written. Go on with the next request, or close after what was written is read."""
        self._running = None
        self._busy = False
        if self._transport is None:
            return
        self._heard = self._began = self.loop.time()
        self._came_bytes = 0
        if keep_alive and not self._closing_soon:
            if not self._reader.held_bytes:
                self.flow.hold_client(False)
            elif not self._pumping:
                # Not from inside the engine's callback: pipelined requests take turns with other clients.
                self.loop.call_soon(self._pump)
        elif self._reader.mid_request:
            self._linger()
        elif self._closing_soon:
            self._hang_up(self._transport)
        else:
            self._transport.close()

    def cut(self, reset: bool = False) -> None:
        """End in the middle of an answer. `reset` when only a reset tells the client that it is not whole."""
        self._running = None
        self._busy = False
        self._closing_soon = True
        if self._transport is None:
            return
        if reset:
            raw = self._transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()
        else:
            self._transport.close()

    def close_when_idle(self) -> None:
        """Shutting down: no further request on this connection."""
        self._closing_soon = True
        if not self._busy and not self._discarding and self._transport is not None:
            self._hang_up(self._transport)

    def _hang_up(self, transport: asyncio.Transport) -> None:
        """Shutting down: all is written. A TLS client may never answer that we close, and the drain waits for it."""
        transport.close()
        if transport.get_extra_info("sslcontext") is not None:
            self.loop.call_later(_LINGER_SECONDS, self._stop_waiting)

    def _stop_waiting(self) -> None:
        if self._transport is None:
            return
        if self._transport.get_write_buffer_size():
            self.loop.call_later(_LINGER_SECONDS, self._stop_waiting)
        else:
            self._transport.abort()

    def end(self) -> None:
        """The proxy ends: a request under way is cut."""
        running = self._running
        self.cut(reset=True)
        if running is not None:
            running.abort(503, "shutdown")

    def _linger(self) -> None:
        """Close our side and read on for a while: closing over unread bytes would reset the answer away."""
        transport = self._transport
        if transport is None or self._discarding:
            return
        self._discarding = True
        self._began, self._came_bytes = self.loop.time(), 0
        self.flow.hold_client(False)
        if transport.can_write_eof():
            transport.write_eof()
        else:
            transport.close()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(_LINGER_SECONDS, self._on_timer)

    def check(self) -> None:
        self._reader.check()
        if self._transport is not None:
            self.flow.check()
        assert self._busy or self._running is None, "a request runs on an idle connection"
        if self._running is not None:
            self._running.check()
