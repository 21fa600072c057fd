"""The parser: whole, byte by byte, with a tail; what it refuses; that cuts never change what it reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from dynamo_proxy.config import Limits
from dynamo_proxy.errors import ProtocolError
from dynamo_proxy.http1 import ChunkDecoder, EndOfMessage, Request, RequestReader, ResponseReader
from dynamo_proxy.http_heads import (
    RequestHead,
    ResponseHead,
    _parse_request_head,
    _parse_response_head,
    parse_request_head,
    parse_response_head,
)
from hypothesis import given
from hypothesis import strategies as st

LIMITS = Limits(max_head_bytes=2048, max_body_bytes=4096)
SIZED = b"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = (
    b"POST /y?q=1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"4;ext=1\r\nWiki\r\n6\r\npedia \r\n0\r\nX-T: 1\r\n\r\n"
)
BARE = b"GET /z HTTP/1.1\r\nhost: a\r\n\r\n"


def read(*pieces: bytes) -> list[Request]:
    reader = RequestReader(LIMITS)
    found = []
    for piece in pieces:
        reader.receive(piece)
        while (event := reader.next_event()) is not None:
            if isinstance(event, Request):
                found.append(event)
        reader.check()
    return found


def said(request: Request) -> tuple[object, ...]:
    return request.head, request.body


def told(head: ResponseHead) -> tuple[object, ...]:
    framing = head.content_length, head.chunked, head.keep_alive
    return head.status, head.reason, head.passing, head.location, head.is_events, framing


def one_by_one(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


@pytest.mark.parametrize("cut", ["whole", "bytes", "tail"])
@pytest.mark.parametrize(
    ("data", "target", "body"),
    [(SIZED, b"/v1/x", b"hello"), (CHUNKED, b"/y?q=1", b"Wikipedia "), (BARE, b"/z", b"")],
)
def test_reads_the_same_request_however_it_comes(data: bytes, target: bytes, body: bytes, cut: str) -> None:
    pieces = {"whole": [data], "bytes": one_by_one(data), "tail": [data + b"GET /nex"]}[cut]
    (request,) = read(*pieces)
    assert (request.head.target, request.body) == (target, body)


def test_pipelined_requests_come_in_order() -> None:
    assert [request.head.path for request in read(SIZED + CHUNKED + b"\r\n\r\n" + BARE)] == [
        "/v1/x",
        "/y",
        "/z",
    ]


@given(st.lists(st.sampled_from([SIZED, CHUNKED, BARE]), min_size=1, max_size=4), st.data())
def test_cuts_never_change_what_is_read(messages: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True) if a < b]
    assert [said(request) for request in read(*pieces)] == [said(request) for request in read(stream)]


@given(st.binary(max_size=300), st.integers(1, 50))
def test_no_bytes_make_it_fail_otherwise_than_by_protocol_error(noise: bytes, size: int) -> None:
    reader = RequestReader(LIMITS)
    try:
        for start in range(0, len(noise), size):
            reader.receive(noise[start : start + size])
            while reader.next_event() is not None:
                pass
    except ProtocolError as error:
        status = error.status
    else:
        status = 400
    assert status in range(400, 600)


HEAD_LINES = [
    b"Host: a", b"Content-Length: 7", b"content-length: 19", b"Content-Length:", b"Content-Length: \n", b"",
    b"X: content-length", b"Transfer-Encoding: chunked", b"Connection: close", b"Content-Length: 1, 7", b"X: 7",
    b"Content-Length:8",
]  # fmt: skip


@given(st.lists(st.lists(st.sampled_from(HEAD_LINES), max_size=4), min_size=1, max_size=6))
def test_a_head_seen_before_reads_as_if_it_were_new(heads: list[list[bytes]]) -> None:
    def outcome(parse: Callable[..., object], *arguments: bytes) -> object:
        try:
            found = parse(*arguments)
        except ProtocolError as error:
            return error.status, error.code, str(error)
        return told(found) if isinstance(found, ResponseHead) else found

    for lines in heads:
        request = b"\r\n".join([b"POST /v1/x?q HTTP/1.1", *lines])
        assert outcome(parse_request_head, request) == outcome(_parse_request_head, request)
        response = b"\r\n".join([b"HTTP/1.1 200 OK", *lines])
        for method in (b"GET", b"HEAD"):
            assert outcome(parse_response_head, response, method) == outcome(_parse_response_head, response, method)


@given(st.sampled_from([SIZED, CHUNKED, BARE]), st.sampled_from([SIZED, BARE, b"x", b"", b"\r\n"]))
def test_what_is_read_whole_is_what_the_slow_way_reads(first: bytes, second: bytes) -> None:
    reader = RequestReader(LIMITS)
    whole = reader.whole(first + second)
    reader.check()
    assert not reader.mid_request
    assert whole is None or [said(whole)] == [said(request) for request in read(first + second)]
    assert (whole is not None) == (second == b"" and first is not CHUNKED)
    reader.receive(SIZED[:9])
    assert reader.whole(first) is None


HOST = b"GET / HTTP/1.1\r\nHost: a\r\n"
REFUSED = {
    "cl and te": (HOST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "two lengths": (HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    "length list": (HOST + b"Content-Length: 1, 1\r\n\r\n", 400),
    "signed length": (HOST + b"Content-Length: +1\r\n\r\n", 400),
    "empty length": (HOST + b"Content-Length:\r\n\r\n", 400),
    "folded line": (HOST + b"X: a\r\n b\r\n\r\n", 400),
    "space before colon": (HOST + b"Content-Length : 1\r\n\r\n", 400),
    "bare lf": (b"GET / HTTP/1.1\nHost: a\n\n", 400),
    "bare lf inside": (HOST + b"X: a\nY: b\r\n\r\n", 400),
    "bare cr": (HOST + b"X: a\rY: b\r\n\r\n", 400),
    "nul": (HOST + b"X: a\0b\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (HOST + b"Host: b\r\n\r\n", 400),
    "te twice": (HOST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 501),
    "te gzip": (HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
    "te obfuscated": (HOST + b"Transfer-Encoding: xchunked\r\n\r\n", 501),
    "te in 1.0": (b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "http 2": (b"PRI * HTTP/2.0\r\n\r\n", 505),
    "no version": (b"GET /\r\nHost: a\r\n\r\n", 400),
    "extra space": (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "authority form": (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "big head": (HOST + b"X: " + b"a" * 3000 + b"\r\n\r\n", 431),
    "endless head": (HOST + b"X: " + b"a" * 3000, 431),
    "big body": (HOST + b"Content-Length: 5000\r\n\r\n", 413),
    "chunk size": (HOST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
    "chunk sign": (HOST + b"Transfer-Encoding: chunked\r\n\r\n+1\r\na\r\n", 400),
    "chunk space": (HOST + b"Transfer-Encoding: chunked\r\n\r\n1 \r\na\r\n", 400),
    "chunk lf": (HOST + b"Transfer-Encoding: chunked\r\n\r\n1\na\r\n0\r\n\r\n", 400),
    "chunk overrun": (HOST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n0\r\n\r\n", 400),
    "expectation": (HOST + b"Expect: magic\r\n\r\n", 417),
}


@pytest.mark.parametrize("cut", ["whole", "bytes"])
@pytest.mark.parametrize("name", REFUSED)
def test_ambiguous_or_oversized_requests_are_refused(name: str, cut: str) -> None:
    data, status = REFUSED[name]
    with pytest.raises(ProtocolError) as caught:
        read(*([data] if cut == "whole" else one_by_one(data)))
    assert caught.value.status == status


def test_chunked_body_over_the_limit_is_refused_before_it_is_whole() -> None:
    head = HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    with pytest.raises(ProtocolError) as caught:
        read(head, *[b"400\r\n" + b"a" * 1024 + b"\r\n"] * 5)
    assert caught.value.status == 413


def test_equal_lengths_are_one_length() -> None:
    (request,) = read(HOST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nok")
    assert request.body == b"ok"


def test_keep_alive_and_absolute_form() -> None:
    heads = [request.head for request in read(
        b"GET http://other/a?b HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: x, Close\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    )]  # fmt: skip
    assert heads[0].target == b"/a?b"
    assert [head.keep_alive for head in heads] == [True, False, False, True]


def test_expect_is_told_before_the_body_comes() -> None:
    reader = RequestReader(LIMITS)
    reader.receive(HOST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    event = reader.next_event()
    assert isinstance(event, RequestHead)
    assert event.expect_continue
    assert reader.next_event() is None


def test_hop_by_hop_headers_do_not_pass() -> None:
    lines = b"Connection: x-Secret, close\r\nX-SECRET: 1\r\nUpgrade: h2c\r\nX-Kept:  2 \r\nX-Dynamo-Engine: 3\r\n"
    (request,) = read(HOST + lines + b"\r\n")
    assert request.head.passing == b"X-Kept:  2 \r\n"


def test_connection_cannot_name_a_header_that_frames() -> None:
    (request,) = read(HOST + b"Connection: content-length, host, content-type\r\nContent-Length: 2\r\n\r\nok")
    assert (request.body, request.head.passing) == (b"ok", b"")
    (request,) = read(HOST + b"Connection: content-type\r\nContent-Type: a/b\r\n\r\n")
    assert request.head.passing == b"Content-Type: a/b\r\n"


# --- responses

RESPONSES = {
    "sized": (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody", b"body", True),
    "chunked": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"3\r\nabc\r\n0\r\n\r\n",
        True,
    ),
    "empty": (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
    "closing": (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx", b"x", False),
    "old": (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx", b"x", False),
    "interim": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", b"x", True),
}  # fmt: skip


@pytest.mark.parametrize("cut", ["whole", "bytes"])
@pytest.mark.parametrize("name", RESPONSES)
def test_responses_pass_untouched_and_end_where_they_end(name: str, cut: str) -> None:
    data, body, reusable = RESPONSES[name]
    reader = ResponseReader(b"GET", 2048)
    events = []
    for piece in [data] if cut == "whole" else one_by_one(data):
        events += reader.feed(piece)
        reader.check()
    assert isinstance(events[0], ResponseHead)
    assert b"".join(event for event in events if isinstance(event, bytes)) == body
    assert events[-1] == EndOfMessage(reusable)
    assert reader.eof() == []


def test_a_response_without_length_ends_with_its_connection() -> None:
    reader = ResponseReader(b"GET", 2048)
    reader.feed(b"HTTP/1.1 200 OK\r\n\r\nsome")
    assert reader.feed(b"thing") == [b"thing"]
    assert reader.eof() == [EndOfMessage(False)]


def test_head_answers_have_no_body_and_surplus_spoils_the_connection() -> None:
    reader = ResponseReader(b"HEAD", 2048)
    assert reader.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")[-1] == EndOfMessage(True)
    reader = ResponseReader(b"GET", 2048)
    assert reader.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nxTRAILING")[-1] == EndOfMessage(False)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.integers(1, 30), st.binary(max_size=5))
def test_decoded_chunks_are_the_payload(parts: list[bytes], size: int, tail: bytes) -> None:
    stream = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    decoder = ChunkDecoder()
    payload = bytearray()
    taken = 0
    data = stream + tail
    for start in range(0, len(data), size):
        taken += decoder.feed(data[start : start + size], payload)
        decoder.check()
    assert (payload, taken, decoder.done) == (b"".join(parts), len(stream), True)


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4), st.booleans(), st.data())
def test_whole_chunks_are_what_the_slow_way_reads(parts: list[bytes], decode: bool, data: st.DataObject) -> None:
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    cuts = sorted(data.draw(st.sets(st.integers(1, len(body) - 1), max_size=6)))
    readers = [ResponseReader(b"GET", 2048, decode) for _ in range(2)]
    for reader in readers:
        reader.feed(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    for start, stop in zip([0, *cuts], [*cuts, len(body)], strict=True):
        piece = body[start:stop]
        slow = readers[0].feed(piece)
        whole = readers[1].whole(piece)
        assert slow == ([whole] if whole is not None else readers[1].feed(piece))
        assert readers[0].at_boundary == readers[1].at_boundary
        readers[1].check()
    assert readers[1].ended
