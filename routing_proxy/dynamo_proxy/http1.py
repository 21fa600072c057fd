"""Sans-IO HTTP/1.1 framing: bytes in, frozen events out. No socket, clock or logger lives here.

`RequestReader` buffers whole requests (routing needs the body). `ResponseReader` never buffers a body: it
yields the engine's bytes as they came and only finds where the message ends.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Final, NamedTuple, final

from .config import Limits
from .errors import ProtocolError
from .http_heads import (
    RequestHead,
    ResponseHead,
    has_bare_newline,
    parse_request_head,
    parse_response_head,
)

_CHUNK_SIZE: Final = re.compile(rb"[0-9A-Fa-f]{1,15}")
_PLAIN_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})\r\n")
_EMPTY_LINES: Final = re.compile(rb"\A(?:\r\n)+")
_MAX_CHUNK_LINE_BYTES: Final = 4096
_MAX_TRAILER_BYTES: Final = 16 * 1024
# The sizes of chunks that events come in, as they are written.
_SMALL_SIZES: Final = {b"%x" % size: size for size in range(1, 2048)}


@final
class Request:
    """A whole request: its head and its decoded body."""

    __slots__ = ("body", "head")

    def __init__(self, head: RequestHead, body: bytes) -> None:
        self.head = head
        self.body = body


class EndOfMessage(NamedTuple):
    """The response is complete; `reusable` says whether its connection may carry another request."""

    reusable: bool


_REUSABLE: Final = EndOfMessage(True)
_SPENT: Final = EndOfMessage(False)


class _Chunk(Enum):
    SIZE = auto()
    DATA = auto()
    DATA_END = auto()
    TRAILER = auto()
    DONE = auto()


def _bad_chunk(message: str) -> ProtocolError:
    return ProtocolError(400, "bad_chunk", message)


class ChunkDecoder:
    """Finds the end of a chunked body, and its payload when asked for it."""

    def __init__(self) -> None:
        self._state = _Chunk.SIZE
        self._left = 0
        self._line = b""
        self._trailer_bytes = 0

    @property
    def done(self) -> bool:
        return self._state is _Chunk.DONE

    @property
    def at_boundary(self) -> bool:
        """True between two chunks: one more chunk could be written here by somebody else."""
        return self._state is _Chunk.SIZE and not self._line

    def feed(self, data: bytes, payload: bytearray | None = None) -> int:
        """Take bytes up to the end of the body; return how many were taken. The payload is appended to
        `payload`.
        """
        position, end = 0, len(data)
        if self.at_boundary:
            position = _whole_chunks(data, payload)
        while position < end and self._state is not _Chunk.DONE:
            if self._state is _Chunk.DATA:
                taken = min(self._left, end - position)
                if payload is not None:
                    payload += data[position : position + taken]
                position += taken
                self._left -= taken
                if not self._left:
                    self._state = _Chunk.DATA_END
                continue
            newline = data.find(b"\n", position)
            stop = newline + 1 if newline >= 0 else end
            self._line += data[position:stop]
            position = stop
            if len(self._line) > _MAX_CHUNK_LINE_BYTES:
                raise _bad_chunk("a chunk line is too long")
            if newline >= 0:
                line, self._line = self._line, b""
                self._on_line(line)
        return position

    def _on_line(self, line: bytes) -> None:
        if not line.endswith(b"\r\n") or b"\r" in line[:-2]:
            raise _bad_chunk("a chunk line does not end in CRLF")
        line = line[:-2]
        if self._state is _Chunk.SIZE:
            size = line.partition(b";")[0]
            if not _CHUNK_SIZE.fullmatch(size):
                raise _bad_chunk("a chunk size is not a hexadecimal number")
            self._left = int(size, 16)
            self._state = _Chunk.DATA if self._left else _Chunk.TRAILER
        elif self._state is _Chunk.DATA_END:
            if line:
                raise _bad_chunk("a chunk is longer than its size")
            self._state = _Chunk.SIZE
        elif not line:
            self._state = _Chunk.DONE
        else:
            self._trailer_bytes += len(line)
            if self._trailer_bytes > _MAX_TRAILER_BYTES:
                raise ProtocolError(431, "trailer_too_large", "the trailer is too large")

    def check(self) -> None:
        assert self._left >= 0, "negative chunk remainder"
        assert (self._state is _Chunk.DATA) == (self._left > 0), f"{self._left} bytes left in {self._state}"
        assert len(self._line) <= _MAX_CHUNK_LINE_BYTES, "chunk line beyond its bound"


def _whole_chunks(data: bytes, payload: bytearray | None) -> int:
    """Where the chunks end that `data` begins with and holds whole: a stream's tokens, nearly always. Their
    payload goes to `payload`.
    """
    position, end = 0, len(data)
    while (size := _PLAIN_SIZE.match(data, position)) is not None:
        stop = size.end() + int(size[1], 16) + 2
        if stop > end or stop == size.end() + 2 or data[stop - 2 : stop] != b"\r\n":
            break
        if payload is not None:
            payload += data[size.end() : stop - 2]
        position = stop
    return position


class RequestReader:
    """Requests of one client connection, in order. Call `receive`, then `next_event` until it returns None.

    Each request gives two events: its head (so that `Expect: 100-continue` can be answered) and the whole
    request. After a ProtocolError the reader must not be used again.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._scanned = 0
        self._head: RequestHead | None = None
        self._length = 0  # of the body under way, unless it is chunked
        self._chunks: ChunkDecoder | None = None
        self._payload = bytearray()

    @property
    def held_bytes(self) -> int:
        """Bytes received and not yet part of an event (decoded chunks included)."""
        return self._held_bytes + len(self._payload)

    @property
    def mid_request(self) -> bool:
        """True when part of a request has come."""
        return self._head is not None or self._held_bytes > 0

    def whole(self, data: bytes) -> Request | None:
        """The request that `data` is, if it is exactly one, plain and alone: what nearly all reads are.

        None leaves everything as it was: then `receive` it, and whatever is wrong with it shows there.
        """
        if self._held or self._head is not None:
            return None
        end = data.find(b"\r\n\r\n")
        if not 0 < end <= self._limits.max_head_bytes:
            return None
        try:
            head, length = parse_request_head(data[:end])
        except ProtocolError:
            return None
        end += 4
        if end + length != len(data) or head.chunked or head.expect_continue or length > self._limits.max_body_bytes:
            return None
        return Request(head, data[end:])

    def receive(self, data: bytes) -> None:
        self._held.append(data)
        self._held_bytes += len(data)

    def next_event(self) -> RequestHead | Request | None:
        """The next event, or None when more bytes are needed. Raises ProtocolError."""
        if self._head is None:
            return self._read_head()
        body = self._read_chunked(self._chunks) if self._chunks is not None else self._read_sized()
        if body is None:
            return None
        request = Request(self._head, body)
        self._head = self._chunks = None
        return request

    def _join(self) -> bytes:
        return self._held[0] if len(self._held) == 1 else b"".join(self._held)

    def _keep(self, data: bytes) -> None:
        self._held = [data] if data else []
        self._held_bytes = len(data)

    def _read_head(self) -> RequestHead | None:
        if not self._held:
            return None
        data = self._join()
        if data.startswith(b"\r\n"):  # RFC 9112 2.2: ignore empty lines before a request line
            data = _EMPTY_LINES.sub(b"", data, count=1)
            self._scanned = 0
        self._keep(data)
        end = data.find(b"\r\n\r\n", max(0, self._scanned - 3))
        if end > self._limits.max_head_bytes or (end < 0 and len(data) > self._limits.max_head_bytes):
            raise ProtocolError(431, "head_too_large", f"the head exceeds {self._limits.max_head_bytes} bytes")
        if end < 0:
            if has_bare_newline(data, max(0, self._scanned - 1)):
                raise ProtocolError(400, "bad_request", "the head holds a bare CR or LF")
            self._scanned = len(data)
            return None
        head, length = parse_request_head(data[:end])
        if length > self._limits.max_body_bytes:
            raise self._too_large()
        self._scanned = 0
        self._keep(data[end + 4 :])
        self._head, self._length = head, length
        self._chunks = ChunkDecoder() if head.chunked else None
        return head

    def _read_sized(self) -> bytes | None:
        length = self._length
        if self._held_bytes < length:
            return None
        if not length:
            return b""
        data = self._join()
        self._keep(data[length:])
        return data[:length] if len(data) > length else data

    def _read_chunked(self, chunks: ChunkDecoder) -> bytes | None:
        data = self._join() if self._held else b""
        taken = chunks.feed(data, self._payload)
        if len(self._payload) > self._limits.max_body_bytes:
            raise self._too_large()
        self._keep(data[taken:])
        if not chunks.done:
            return None
        body, self._payload = bytes(self._payload), bytearray()
        return body

    def _too_large(self) -> ProtocolError:
        limit = self._limits.max_body_bytes
        return ProtocolError(413, "body_too_large", f"the request body exceeds {limit} bytes")

    def check(self) -> None:
        assert self._held_bytes == sum(map(len, self._held)), "held bytes miscounted"
        assert self._chunks is not None or not self._payload, "payload of no chunked body"
        assert self._chunks is None or self._head is not None, "chunk decoder without a head"
        if self._chunks is not None:
            self._chunks.check()


ResponseEvent = ResponseHead | bytes | EndOfMessage


class ResponseReader:
    """One response of an engine. `feed` gives its head, its body bytes as they came, and its end.

    With `decode` the chunked framing is removed (for an HTTP/1.0 client). 1xx heads are swallowed.
    """

    def __init__(self, request_method: bytes, max_head_bytes: int, decode: bool = False) -> None:
        self._method = request_method
        self._max_head_bytes = max_head_bytes
        self._decode = decode
        self._held = b""
        self._left = 0
        self._head: ResponseHead | None = None
        self._chunks: ChunkDecoder | None = None
        self.started = False  # any byte has come
        self.ended = False

    @property
    def at_boundary(self) -> bool:
        """True if another chunk may follow what was relayed so far."""
        return self._chunks is not None and self._chunks.at_boundary and not self._decode

    def whole(self, data: bytes) -> bytes | None:
        """The body bytes in `data`, if it is whole chunks and not the last one: what nearly all reads of a stream are.

        None leaves everything as it was: then `feed` it.
        """
        chunks = self._chunks
        if chunks is None or not chunks.at_boundary:
            return None
        start = data.find(b"\r\n") + 2
        size = _SMALL_SIZES.get(data[: start - 2], 0)
        if size and start + size + 2 == len(data) and data.endswith(b"\r\n"):
            return data[start:-2] if self._decode else data  # one chunk, as nearly always
        if not self._decode:
            return data if _whole_chunks(data, None) == len(data) else None
        payload = bytearray()
        return bytes(payload) if _whole_chunks(data, payload) == len(data) else None

    def feed(self, data: bytes) -> list[ResponseEvent]:
        """Events in these bytes. Raises ProtocolError when they are not HTTP or go on past the end."""
        events: list[ResponseEvent] = []
        if data:
            self.started = True
        while self._head is None:
            if self._held:
                data, self._held = self._held + data, b""
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._held = data
                if len(data) > self._max_head_bytes:
                    raise ProtocolError(502, "bad_response", "the engine's response head is too large")
                return events
            head = parse_response_head(data[:end], self._method)
            data = data[end + 4 :]
            if head.status >= 200:
                self._begin_body(head, events)
            elif head.status == 101:
                raise ProtocolError(502, "bad_response", "the engine switched protocols unasked")
        if data:
            self._body(data, events)
        return events

    def eof(self) -> list[ResponseEvent]:
        """The connection ended. Empty if the message is thereby cut short."""
        head = self._head
        if head is None or self.ended or head.chunked or head.content_length is not None:
            return []
        self.ended = True
        return [_SPENT]

    def _begin_body(self, head: ResponseHead, events: list[ResponseEvent]) -> None:
        self._head = head
        events.append(head)
        if head.chunked:
            self._chunks = ChunkDecoder()
        elif head.content_length is not None:
            self._left = head.content_length
            if not self._left:
                self._end(events, b"")

    def _body(self, data: bytes, events: list[ResponseEvent]) -> None:
        assert self._head is not None
        if self.ended:
            raise ProtocolError(502, "bad_response", "the engine sent bytes past the end of its response")
        chunks = self._chunks
        if chunks is not None:
            payload = bytearray() if self._decode else None
            taken = chunks.feed(data, payload)
            raw = data if taken == len(data) else data[:taken]
            if payload is None or payload:
                events.append(raw if payload is None else bytes(payload))
            if chunks.done:
                self._end(events, data[taken:])
        elif self._head.content_length is not None:
            taken = min(self._left, len(data))
            self._left -= taken
            events.append(data if taken == len(data) else data[:taken])
            if not self._left:
                self._end(events, data[taken:])
        else:
            events.append(data)

    def _end(self, events: list[ResponseEvent], surplus: bytes) -> None:
        assert self._head is not None
        self.ended = True
        # Bytes nobody asked for: this response stands, but the connection can no longer be trusted.
        events.append(_REUSABLE if self._head.keep_alive and not surplus else _SPENT)

    def check(self) -> None:
        assert self._left >= 0, "negative body remainder"
        assert not (self._head is not None and self._held), "held bytes after the head"
        assert not self.ended or self._head is not None, "ended before a head"
        if self._chunks is not None:
            self._chunks.check()
