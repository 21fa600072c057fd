"""HTTP/1.1 heads: bytes to frozen records, strictly. Whatever two parsers could read differently is refused.

The stance follows RFC 9112 where it says "MUST reject", and is harder where it says "MAY": no obs-fold, no
bare CR or LF, no whitespace before a colon, no Content-Length beside Transfer-Encoding, no coding but a
single `chunked`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import ProtocolError

Headers = tuple[tuple[bytes, bytes], ...]

_TOKEN_BYTES = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# A CR or LF outside a CRLF pair, or a control byte (tab is allowed).
_ILLEGAL = re.compile(rb"\r(?!\n)|(?<!\r)\n|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_BARE_NEWLINE = re.compile(rb"(?<!\r)\n|\r[^\n]")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([^\r\n]*))?")
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization",
     b"te", b"trailer", b"upgrade", b"expect", b"http2-settings")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RequestHead:
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


@dataclass(frozen=True, slots=True)
class ResponseHead:
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


@dataclass(frozen=True, slots=True)
class _Framing:
    content_length: int | None
    chunked: bool
    connection: frozenset[bytes]


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
    headers = _headers(lines)
    framing = _framing(headers)
    minor = version[7] - 48
    hosts = sum(1 for name, _ in headers if name == b"host")
    if hosts > 1 or (minor == 1 and hosts == 0):
        raise _bad("exactly one Host header is required")
    if minor == 0 and framing.chunked:
        raise _bad("Transfer-Encoding needs HTTP/1.1")
    keep = b"close" not in framing.connection if minor else b"keep-alive" in framing.connection
    expect = [value.lower() for name, value in headers if name == b"expect"]
    if expect and expect != [b"100-continue"]:
        raise ProtocolError(417, "expectation_failed", "the only expectation served is 100-continue")
    length = framing.content_length
    if length is None and not framing.chunked:
        length = 0
    return RequestHead(
        method,
        _origin_form(method, target),
        minor,
        headers,
        length,
        framing.chunked,
        keep,
        bool(expect) and minor == 1,
    )


def parse_response_head(block: bytes, request_method: bytes) -> ResponseHead:
    """Parse an engine's response head; `request_method` decides whether a body follows."""
    lines = _lines(block)
    match = _STATUS_LINE.fullmatch(lines[0])
    if match is None:
        raise _bad("the engine's status line is not HTTP/1.x")
    headers = _headers(lines)
    framing = _framing(headers)
    minor, status = int(match[1]), int(match[2])
    length, chunked = framing.content_length, framing.chunked
    if request_method == b"HEAD" or status in (204, 304) or status < 200:
        length, chunked = 0, False
    keep = b"close" not in framing.connection if minor else b"keep-alive" in framing.connection
    return ResponseHead(
        status, match[3] or b"", headers, length, chunked, keep and (chunked or length is not None)
    )


def end_to_end(headers: Headers) -> list[tuple[bytes, bytes]]:
    """The headers that may pass a proxy: no hop-by-hop names, nor any that Connection names."""
    named = {
        token.strip().lower()
        for name, value in headers
        if name == b"connection"
        for token in value.split(b",")
    }  # fmt: skip
    named -= {b"content-length", b"transfer-encoding", b"host"}
    return [(name, value) for name, value in headers if name not in _HOP_BY_HOP and name not in named]


def _bad(message: str) -> ProtocolError:
    return ProtocolError(400, "bad_request", message)


def _is_token(name: bytes) -> bool:
    return bool(name) and not name.translate(None, _TOKEN_BYTES)


def _lines(block: bytes) -> list[bytes]:
    if _ILLEGAL.search(block):
        raise _bad("the head holds a bare CR or LF, or a control character")
    return block.split(b"\r\n")


def _headers(lines: list[bytes]) -> Headers:
    headers = []
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        if not colon or not _is_token(name):
            raise _bad("a header line is not NAME: VALUE (folded lines are refused)")
        headers.append((name.lower(), value.strip(b" \t")))
    return tuple(headers)


def _framing(headers: Headers) -> _Framing:
    lengths: set[bytes] = set()
    codings: list[bytes] = []
    connection: list[bytes] = []
    for name, value in headers:
        if name == b"content-length":
            lengths.add(value)
        elif name == b"transfer-encoding":
            codings.append(value.lower())
        elif name == b"connection":
            connection.extend(token.strip() for token in value.lower().split(b","))
    if lengths and codings:
        raise _bad("Content-Length and Transfer-Encoding exclude each other")
    if codings and codings != [b"chunked"]:
        raise ProtocolError(501, "transfer_encoding", "the only transfer coding served is a single chunked")
    if len(lengths) > 1:
        raise _bad("two Content-Length headers differ")
    length = None
    if lengths:
        text = lengths.pop()
        if not text.isdigit() or len(text) > 18:
            raise _bad("Content-Length is not a number")
        length = int(text)
    return _Framing(length, bool(codings), frozenset(connection))


def _origin_form(method: bytes, target: bytes) -> bytes:
    if target.startswith(b"/") or (target == b"*" and method == b"OPTIONS"):
        return target
    if target[:7].lower() == b"http://":
        slash = target.find(b"/", 7)
        return target[slash:] if slash >= 0 else b"/"
    raise _bad("the request target is not a path")
