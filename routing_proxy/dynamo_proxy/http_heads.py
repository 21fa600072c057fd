"""HTTP/1.1 heads: bytes to frozen records, strictly. Whatever two parsers could read differently is refused.

The stance follows RFC 9112 where it says "MUST reject", and is harder where it says "MAY": no obs-fold, no
bare CR or LF, no whitespace before a colon, no Content-Length beside Transfer-Encoding, no coding but a
single `chunked`.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple, final

from .errors import ProtocolError

_TOKEN_BYTES = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_CONTROL_BYTES = bytes(set(range(32)) - set(b"\t")) + b"\x7f"
_BARE_NEWLINE = re.compile(rb"(?<!\r)\n|\r[^\n]")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([^\r\n]*))?")
# Names that we read. `content-type` passes on as well; the others are written anew where they belong.
_ROUTE = b"x-dynamo-route"
_READ = frozenset(
    (b"host", b"content-length", b"transfer-encoding", b"expect", b"connection", b"content-type", b"location", _ROUTE)
)
_HOP_BY_HOP = frozenset(
    (b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
     b"upgrade", b"http2-settings")
)  # fmt: skip
_OURS = b"x-dynamo-"  # never passed on from either side
_PASS: Final = b""
_DROP: Final = b"-"
_MAX_NAMES = 4096
# Heads seen before, by all their bytes but the digits of their one Content-Length: a client's requests differ in
# nothing else. A head that has no such digits is never looked up here, so no head can be taken for another one.
_LENGTHS: Final = b"\r\nContent-Length: ", b"\r\ncontent-length: "
_BODILESS = (204, 304)
_MAX_KNOWN: Final = 1024
_MAX_KNOWN_BYTES: Final = 2048
_kinds: Final[dict[bytes, bytes]] = {}  # header name as written -> _PASS, _DROP or its name of _READ


class RequestHead(NamedTuple):
    """One request head, but for its Content-Length. `passing` holds the header lines that may pass
    a proxy, as they came and each with its CRLF, without Host and framing.
    """

    method: bytes
    target: bytes
    minor_version: int
    passing: bytes
    chunked: bool
    keep_alive: bool
    expect_continue: bool
    path: str  # the target without its query
    wants_route: bool = False  # x-dynamo-route: the client asks why it went where it went


@final
class ResponseHead:
    """One response head; `content_length` None and not `chunked` means the body ends with the connection.

    `passing` as in a request, with the Content-Length and without Location, which may name the engine.
    """

    __slots__ = ("chunked", "content_length", "is_events", "keep_alive", "location", "passing", "reason", "status")

    def __init__(
        self, status: int, reason: bytes, passing: bytes, content_length: int | None, chunked: bool, keep_alive: bool
    ) -> None:
        self.status = status
        self.reason = reason
        self.passing = passing
        self.content_length = content_length
        self.chunked = chunked
        self.keep_alive = keep_alive
        self.location = b""
        self.is_events = False

    def sized(self, passing: bytes, length: int) -> ResponseHead:
        """The same for a body of this length; `passing` tells it."""
        head = ResponseHead(self.status, self.reason, passing, length, False, self.keep_alive)
        head.location, head.is_events = self.location, self.is_events
        return head


class _Fields:
    """What a head's lines say of framing and connection, and which of them pass (gathered in one pass)."""

    __slots__ = (
        "codings", "connection", "expect", "hosts", "is_events", "lengths", "location", "passing", "wants_route",
    )  # fmt: skip

    def __init__(self, lines: list[bytes]) -> None:
        self.passing: list[bytes] = []
        self.lengths: set[bytes] = set()
        self.codings: list[bytes] = []
        self.connection: list[bytes] = []
        self.expect: list[bytes] = []
        self.hosts = 0
        self.is_events = False
        self.location = b""
        self.wants_route = False
        kinds, keep = _kinds, self.passing.append
        for line in lines:
            name, colon, value = line.partition(b":")
            if not colon:
                raise _bad("a header line is not NAME: VALUE (folded lines are refused)")
            kind = kinds.get(name)
            if kind is None:
                kind = _kind(name)
            if kind is _PASS:
                keep(line)
            elif kind is not _DROP:
                self._read(kind, value.strip(b" \t"), line)
        named: set[bytes] = set(self.connection) - {b"close", b"keep-alive", b"content-type"}
        if named:
            self.passing = [line for line in self.passing if line.partition(b":")[0].lower() not in named]

    def _read(self, name: bytes, value: bytes, line: bytes) -> None:
        if name == b"content-type":
            self.passing.append(line)
            self.is_events = value.lower().startswith(b"text/event-stream")
        elif name == b"host":
            self.hosts += 1
        elif name == b"content-length":
            self.lengths.add(value)
        elif name == b"transfer-encoding":
            self.codings.append(value.lower())
        elif name == b"expect":
            self.expect.append(value.lower())
        elif name == b"location":
            self.location = value
        elif name == _ROUTE:
            self.wants_route = value not in (b"", b"0", b"false")
        else:
            self.connection += [token.strip() for token in value.lower().split(b",")]

    def framing(self) -> tuple[int | None, bool]:
        """(Content-Length, chunked). Raises ProtocolError where two readers could disagree."""
        if self.lengths and self.codings:
            raise _bad("Content-Length and Transfer-Encoding exclude each other")
        if self.codings and self.codings != [b"chunked"]:
            raise ProtocolError(501, "transfer_encoding", "the only transfer coding served is a single chunked")
        if len(self.lengths) > 1:
            raise _bad("two Content-Length headers differ")
        if not self.lengths:
            return None, bool(self.codings)
        (text,) = self.lengths
        if not text.isdigit() or len(text) > 18:
            raise _bad("Content-Length is not a number")
        return int(text), False

    def keeps_alive(self, minor_version: int) -> bool:
        return b"close" not in self.connection if minor_version else b"keep-alive" in self.connection

    def passing_block(self) -> bytes:
        return b"\r\n".join((*self.passing, b"")) if self.passing else b""


def has_bare_newline(data: bytes, start: int) -> bool:
    """True if a bare CR or LF lies in `data` from `start` on (a CR at the very end may still become a
    CRLF).
    """
    return _BARE_NEWLINE.search(data, start) is not None


_known_requests: Final[dict[bytes, RequestHead]] = {}
_known_responses: Final[dict[bytes, ResponseHead]] = {}  # without the line of their length


def _length_digits(block: bytes) -> tuple[int, int]:
    """Where the digits of a plain Content-Length line begin and end; equal if there is none."""
    written, other = _LENGTHS
    start = block.find(written)
    if start < 0:
        start = block.find(other)
    if start < 0:
        return 0, 0
    start += len(written)
    end = block.find(b"\r\n", start)
    if end < 0:
        end = len(block)
    return (start, end) if end - start <= 18 and block[start:end].isdigit() else (0, 0)


def parse_request_head(block: bytes) -> tuple[RequestHead, int]:
    """Parse the bytes before the empty line: the head, and its Content-Length (0 if it has none).

    Raises ProtocolError with the status to answer.
    """
    start, end = _length_digits(block)
    if start == end:
        return _parse_request_head(block)
    key = block[:start] + block[end:]
    known = _known_requests.get(key)
    if known is not None:
        return known, int(block[start:end])
    parsed = _parse_request_head(block)
    if _may_be_known(block, key):
        if len(_known_requests) >= _MAX_KNOWN:
            _known_requests.clear()
        _known_requests[key] = parsed[0]
    return parsed


def _may_be_known(block: bytes, key: bytes) -> bool:
    """True if the digits cut from this head are its only Content-Length, and it is small enough to keep."""
    return len(key) <= _MAX_KNOWN_BYTES and block.lower().count(b"content-length") == 1


def _parse_request_head(block: bytes) -> tuple[RequestHead, int]:
    first, *lines = _lines(block)
    parts = first.split(b" ")
    if len(parts) != 3 or not _is_token(parts[0]):
        raise _bad("the request line is not METHOD TARGET VERSION")
    method, target, version = parts
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        if re.fullmatch(rb"HTTP/[0-9](\.[0-9])?", version):
            raise ProtocolError(505, "http_version", "only HTTP/1.1 and HTTP/1.0 are served")
        raise _bad("the request line does not end in an HTTP version")
    fields = _Fields(lines)
    minor = version[7] - 48
    if fields.hosts > 1 or (minor == 1 and not fields.hosts):
        raise _bad("exactly one Host header is required")
    length, chunked = fields.framing()
    if minor == 0 and chunked:
        raise _bad("Transfer-Encoding needs HTTP/1.1")
    if fields.expect and fields.expect != [b"100-continue"]:
        raise ProtocolError(417, "expectation_failed", "the only expectation served is 100-continue")
    path = target if target.startswith(b"/") else _origin_form(method, target)
    expects = bool(fields.expect) and minor == 1
    keep = fields.keeps_alive(minor)
    name = path.partition(b"?")[0].decode("latin-1")
    route = fields.wants_route
    return RequestHead(method, path, minor, fields.passing_block(), chunked, keep, expects, name, route), length or 0


def parse_response_head(block: bytes, request_method: bytes) -> ResponseHead:
    """Parse an engine's response head; `request_method` decides whether a body follows."""
    start, end = _length_digits(block)
    if start == end or request_method == b"HEAD":
        return _parse_response_head(block, request_method)
    key = block[:start] + block[end:]
    known = _known_responses.get(key)
    if known is not None:
        count = int(block[start:end])
        return known.sized(known.passing + b"content-length: %d\r\n" % count, count)
    head = _parse_response_head(block, request_method)
    plain = head.content_length is not None and head.status >= 200 and head.status not in _BODILESS
    if plain and _may_be_known(block, key):
        if len(_known_responses) >= _MAX_KNOWN:
            _known_responses.clear()
        line = b"content-length: %d\r\n" % int(block[start:end])
        _known_responses[key] = head.sized(head.passing.removesuffix(line), 0)
    return head


def _parse_response_head(block: bytes, request_method: bytes) -> ResponseHead:
    first, *lines = _lines(block)
    match = _STATUS_LINE.fullmatch(first)
    if match is None:
        raise _bad("the engine's status line is not HTTP/1.x")
    fields = _Fields(lines)
    status = int(match[2])
    length, chunked = fields.framing()
    if length is not None and status != 204:
        fields.passing.append(b"content-length: %d" % length)
    if request_method == b"HEAD" or status in _BODILESS or status < 200:
        length, chunked = 0, False
    keep = fields.keeps_alive(int(match[1])) and (chunked or length is not None)
    head = ResponseHead(status, match[3] or b"", fields.passing_block(), length, chunked, keep)
    head.location, head.is_events = fields.location, fields.is_events
    return head


def _kind(name: bytes) -> bytes:
    """What becomes of a header of this name. Raises ProtocolError if it is no name."""
    if not _is_token(name):
        raise _bad("a header line is not NAME: VALUE (folded lines are refused)")
    if len(_kinds) >= _MAX_NAMES:
        _kinds.clear()
    low = name.lower()
    kind = next((known for known in _READ if known == low), _PASS)
    if low in _HOP_BY_HOP or (low.startswith(_OURS) and low != _ROUTE):
        kind = _DROP
    _kinds[name] = kind
    return kind


def _bad(message: str) -> ProtocolError:
    return ProtocolError(400, "bad_request", message)


def _is_token(name: bytes) -> bool:
    return bool(name) and not name.translate(None, _TOKEN_BYTES)


def _lines(block: bytes) -> list[bytes]:
    lines = block.split(b"\r\n")
    # Every control byte that is left beside those CRLFs is one too many.
    if len(block.translate(None, _CONTROL_BYTES)) != len(block) - 2 * (len(lines) - 1):
        raise _bad("the head holds a bare CR or LF, or a control character")
    return lines


def _origin_form(method: bytes, target: bytes) -> bytes:
    if target == b"*" and method == b"OPTIONS":
        return target
    if target[:7].lower() == b"http://":
        slash = target.find(b"/", 7)
        return target[slash:] if slash >= 0 else b"/"
    raise _bad("the request target is not a path")
