"""HTTP/1.1 heads: bytes to frozen records, strictly. Whatever two parsers could read differently is refused.

The stance follows RFC 9112 where it says "MUST reject", and is harder where it says "MAY": no obs-fold, no
bare CR or LF, no whitespace before a colon, no Content-Length beside Transfer-Encoding, no coding but a
single `chunked`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .errors import ProtocolError

Headers = tuple[tuple[bytes, bytes], ...]

_TOKEN_BYTES = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_CONTROL_BYTES = bytes(set(range(32)) - set(b"\t\r\n")) + b"\x7f"
_BARE_NEWLINE = re.compile(rb"(?<!\r)\n|\r[^\n]")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([^\r\n]*))?")
_FRAMING_NAMES = frozenset((b"host", b"content-length", b"transfer-encoding", b"expect", b"connection"))
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization",
     b"te", b"trailer", b"upgrade", b"expect", b"http2-settings")
)  # fmt: skip


class RequestHead(NamedTuple):
    """One request head. Header names are lower case; `content_length` is None when chunked."""

    method: bytes
    target: bytes
    minor_version: int
    headers: Headers
    content_length: int | None
    chunked: bool
    keep_alive: bool
    expect_continue: bool

    @property
    def path(self) -> str:
        return self.target.partition(b"?")[0].decode("latin-1")


class ResponseHead(NamedTuple):
    """One response head; `content_length` None and not `chunked` means the body ends with the connection."""

    status: int
    reason: bytes
    headers: Headers
    content_length: int | None
    chunked: bool
    keep_alive: bool

    def header(self, name: bytes) -> bytes:
        """The first value of a header, or empty bytes."""
        return next((value for key, value in self.headers if key == name), b"")


class _Fields(NamedTuple):
    """A head's headers, and what they say of framing and connection (gathered in one pass)."""

    headers: Headers
    content_length: int | None
    chunked: bool
    connection: tuple[bytes, ...]
    hosts: int
    expect: tuple[bytes, ...]


def has_bare_newline(data: bytes, start: int) -> bool:
    """True if a bare CR or LF lies in `data` from `start` on (a CR at the very end may still become a
    CRLF).
    """
    return _BARE_NEWLINE.search(data, start) is not None


def parse_request_head(block: bytes) -> RequestHead:
    """Parse the bytes before the empty line. Raises ProtocolError with the status to answer."""
    lines = _lines(block)
    parts = lines[0].split(b" ")
    if len(parts) != 3 or not _is_token(parts[0]):
        raise _bad("the request line is not METHOD TARGET VERSION")
    method, target, version = parts
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        if re.fullmatch(rb"HTTP/[0-9](\.[0-9])?", version):
            raise ProtocolError(505, "http_version", "only HTTP/1.1 and HTTP/1.0 are served")
        raise _bad("the request line does not end in an HTTP version")
    fields = _fields(lines)
    minor = version[7] - 48
    if fields.hosts > 1 or (minor == 1 and not fields.hosts):
        raise _bad("exactly one Host header is required")
    if minor == 0 and fields.chunked:
        raise _bad("Transfer-Encoding needs HTTP/1.1")
    keep = b"close" not in fields.connection if minor else b"keep-alive" in fields.connection
    if fields.expect and fields.expect != (b"100-continue",):
        raise ProtocolError(417, "expectation_failed", "the only expectation served is 100-continue")
    length = fields.content_length
    if length is None and not fields.chunked:
        length = 0
    expects = bool(fields.expect) and minor == 1
    path = _origin_form(method, target)
    return RequestHead(method, path, minor, fields.headers, length, fields.chunked, keep, expects)


def parse_response_head(block: bytes, request_method: bytes) -> ResponseHead:
    """Parse an engine's response head; `request_method` decides whether a body follows."""
    lines = _lines(block)
    match = _STATUS_LINE.fullmatch(lines[0])
    if match is None:
        raise _bad("the engine's status line is not HTTP/1.x")
    fields = _fields(lines)
    minor, status = int(match[1]), int(match[2])
    length, chunked = fields.content_length, fields.chunked
    if request_method == b"HEAD" or status in (204, 304) or status < 200:
        length, chunked = 0, False
    keep = b"close" not in fields.connection if minor else b"keep-alive" in fields.connection
    return ResponseHead(
        status, match[3] or b"", fields.headers, length, chunked, keep and (chunked or length is not None)
    )


def end_to_end(headers: Headers) -> list[tuple[bytes, bytes]]:
    """The headers that may pass a proxy: no hop-by-hop names, nor any that Connection names."""
    named: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            named.update(token.strip().lower() for token in value.split(b","))
    dropped = _HOP_BY_HOP | (named - _FRAMING_NAMES) if named else _HOP_BY_HOP
    return [header for header in headers if header[0] not in dropped]


def _bad(message: str) -> ProtocolError:
    return ProtocolError(400, "bad_request", message)


def _is_token(name: bytes) -> bool:
    return bool(name) and not name.translate(None, _TOKEN_BYTES)


def _lines(block: bytes) -> list[bytes]:
    pairs = block.count(b"\r\n")
    bare = block.count(b"\r") != pairs or block.count(b"\n") != pairs
    if bare or len(block.translate(None, _CONTROL_BYTES)) != len(block):
        raise _bad("the head holds a bare CR or LF, or a control character")
    return block.split(b"\r\n")


def _fields(lines: list[bytes]) -> _Fields:
    headers = []
    lengths: set[bytes] = set()
    codings: list[bytes] = []
    connection: list[bytes] = []
    expect: list[bytes] = []
    hosts = 0
    for line in lines[1:]:
        raw_name, colon, raw_value = line.partition(b":")
        if not colon or not raw_name or raw_name.translate(None, _TOKEN_BYTES):
            raise _bad("a header line is not NAME: VALUE (folded lines are refused)")
        name, value = raw_name.lower(), raw_value.strip(b" \t")
        headers.append((name, value))
        if name not in _FRAMING_NAMES:
            continue
        if name == b"host":
            hosts += 1
        elif name == b"content-length":
            lengths.add(value)
        elif name == b"transfer-encoding":
            codings.append(value.lower())
        elif name == b"expect":
            expect.append(value.lower())
        else:
            connection.extend(token.strip() for token in value.lower().split(b","))
    length, chunked = _body_framing(lengths, codings)
    return _Fields(tuple(headers), length, chunked, tuple(connection), hosts, tuple(expect))


def _body_framing(lengths: set[bytes], codings: list[bytes]) -> tuple[int | None, bool]:
    if lengths and codings:
        raise _bad("Content-Length and Transfer-Encoding exclude each other")
    if codings and codings != [b"chunked"]:
        raise ProtocolError(501, "transfer_encoding", "the only transfer coding served is a single chunked")
    if len(lengths) > 1:
        raise _bad("two Content-Length headers differ")
    if not lengths:
        return None, bool(codings)
    text = lengths.pop()
    if not text.isdigit() or len(text) > 18:
        raise _bad("Content-Length is not a number")
    return int(text), False


def _origin_form(method: bytes, target: bytes) -> bytes:
    if target.startswith(b"/") or (target == b"*" and method == b"OPTIONS"):
        return target
    if target[:7].lower() == b"http://":
        slash = target.find(b"/", 7)
        return target[slash:] if slash >= 0 else b"/"
    raise _bad("the request target is not a path")
