"""Services that refuse, hang, trickle, lie and die: a miss with its reason, no byte handed out, nothing left behind.

No clock is asserted. A read that came back although the service would have gone on for ever has kept its deadline, and
the service then sees its peer hang up.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace

import psutil
import pytest

from dynamo_connectors.tiers import object as object_module
from dynamo_connectors.tiers import object_format, object_requests, object_upkeep
from dynamo_connectors.tiers.object import ObjectStore
from dynamo_connectors.tiers.object_client import ObjectClient
from tests.tiers.object_stores import (
    CHUNK,
    CHUNK_BLOCKS,
    KEYS,
    NAMESPACE,
    ROW,
    ROWS,
    SETTINGS,
    buffers,
    close,
    key,
    list_all,
    object_store,
    put,
    read,
    reason,
    refusal,
    start_read,
    start_write,
)
from tests.tiers.s3_servers import Behaviour, FaultServer, answer, hang, part, say, trickle

SOON = replace(SETTINGS, deadline_seconds=0.2)
BODY = bytes(object_format.encode(NAMESPACE.digest, KEYS, ROWS, ROW))
STRIDE = object_format.row_stride(ROW)
OTHER = bytes(object_format.encode(NAMESPACE.digest, KEYS[::-1], ROWS, ROW))


@pytest.fixture(autouse=True)
def environment(credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_upkeep, "_RETRY_SECONDS", 0.02)


@pytest.fixture
def serve() -> Iterator[Callable[[Behaviour], FaultServer]]:
    """Starts services that behave as told."""
    servers: list[FaultServer] = []

    def start(behave: Behaviour) -> FaultServer:
        servers.append(FaultServer(behave))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def cut(connection: socket.socket, request: str) -> None:
    """Promises the whole body, sends half of it, and is gone."""
    connection.sendall(part(BODY[: len(BODY) // 2], length=len(BODY)))


ANSWERED_FAULTS: list[tuple[str, Behaviour, str]] = [
    ("503", say(answer("503 Slow Down")), "unavailable"),
    ("500", say(answer("500 Internal Server Error", b"<Error/>")), "unavailable"),
    ("429", say(answer("429 Too Many Requests")), "unavailable"),
    ("403", say(answer("403 Forbidden", b"<Error><Code>AccessDenied</Code></Error>")), "forbidden"),
    ("401", say(answer("401 Unauthorized")), "forbidden"),
    ("400", say(answer("400 Bad Request")), "bad_answer"),
    ("416", say(answer("416 Range Not Satisfiable")), "cut_body"),
    ("cut body", cut, "bad_answer"),
    ("short body, honest length", say(part(BODY[:-1])), "cut_body"),
    ("long body", say(part(BODY + b"x")), "bad_answer"),
    ("another part", say(part(BODY, start=STRIDE)), "bad_answer"),
    ("whole object although a part was asked for", say(answer("200 OK", BODY)), "bad_answer"),
    ("wrong bytes", say(part(bytes(len(BODY)))), "bad_header"),
    ("flipped bit", say(part(BODY[:-1] + bytes([BODY[-1] ^ 1]))), "bad_checksum"),
    ("another chain", say(part(OTHER)), "wrong_key"),
    ("rows shifted by one", say(part(BODY[STRIDE:] + BODY[:STRIDE])), "wrong_key"),
    ("no HTTP at all", say(b"SSH-2.0-OpenSSH_9.2\r\n"), "unreachable"),
    ("hung up", say(b""), "unreachable"),
    ("redirected to nowhere", say(answer("307 Moved", extra="Location: http://127.0.0.1:1/\r\n")), "unreachable"),
]


@pytest.mark.parametrize(("behave", "reason"), [pytest.param(*rest, id=name) for name, *rest in ANSWERED_FAULTS])
def test_a_bad_answer_is_a_miss_with_its_reason(
    serve: Callable[[Behaviour], FaultServer], behave: Behaviour, reason: str
) -> None:
    server = serve(behave)
    with object_store(server.url) as store:
        assert refusal(store) == reason
        assert store.stats().failures[reason] == 1
        assert [line for line in server.requests if line.startswith("GET")] == server.requests[:1], "asked once"
        server.behave = say(part(BODY))
        assert read(store) == ROWS, "one failure does not close the store"


@pytest.mark.parametrize(
    "behave",
    [
        pytest.param(hang, id="hang"),
        pytest.param(trickle(b"HTTP/1.1 206 Partial Content\r\nX-Slow: "), id="slow head"),
        pytest.param(trickle(part(b"", length=len(BODY))), id="slow body"),
    ],
)
def test_a_service_that_never_ends_is_left_at_the_deadline(
    serve: Callable[[Behaviour], FaultServer], behave: Behaviour
) -> None:
    server = serve(behave)
    with object_store(server.url, SOON) as store:
        assert refusal(store) == "timeout"
        assert store.stats().failures == {"timeout": 1}
        assert server.left.acquire(timeout=60), "the connection was left open"


def test_a_service_that_nobody_runs_is_a_miss(serve: Callable[[Behaviour], FaultServer]) -> None:
    server = serve(hang)
    server.close()
    with object_store(server.url) as store:
        assert refusal(store) == "unreachable"


def test_a_name_that_nobody_knows_is_a_miss() -> None:
    with object_store("http://no-such-host.invalid") as store:
        assert refusal(store) == "unreachable"


def test_a_peer_that_accepts_nothing_is_left_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, socket.socket() as filler:
        filler.connect(listener.getsockname())  # the queue is full: the next SYN gets no answer
        with object_store(f"http://127.0.0.1:{listener.getsockname()[1]}", SOON) as store:
            assert refusal(store) == "timeout"


def test_a_late_answer_writes_into_no_buffer(serve: Callable[[Behaviour], FaultServer]) -> None:
    given_up, sent = threading.Event(), threading.Event()

    def answer_late(connection: socket.socket, request: str) -> None:
        assert given_up.wait(60)
        try:
            connection.sendall(part(BODY))
        finally:
            sent.set()

    server = serve(answer_late)
    with object_store(server.url, SOON) as store:
        into = buffers(CHUNK_BLOCKS)
        assert reason(start_read(store, into)) == "timeout"
        given_up.set()
        assert sent.wait(60)
        server.behave = say(part(BODY))
        assert read(store) == ROWS
        assert into == buffers(CHUNK_BLOCKS)


def test_a_read_that_is_cancelled_hangs_up_and_leaves_its_buffers_alone(
    serve: Callable[[Behaviour], FaultServer],
) -> None:
    server = serve(hang)
    with object_store(server.url, replace(SETTINGS, deadline_seconds=600.0)) as store:
        into = buffers(CHUNK_BLOCKS)
        outcome = start_read(store, into)
        while not server.requests:
            threading.Event().wait(0.01)
        assert outcome.cancel()
        assert server.left.acquire(timeout=20), "the connection was left open"
        assert into == buffers(CHUNK_BLOCKS)


def test_a_read_that_is_cancelled_when_all_has_come_leaves_its_buffers_alone(
    serve: Callable[[Behaviour], FaultServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(say(part(BODY)))
    with object_store(server.url) as store:
        into, proven, real = buffers(CHUNK_BLOCKS), threading.Event(), object_format.payload_of

        def cancelled_meanwhile(*arguments: bytes) -> memoryview:
            outcome.cancel()
            proven.set()
            return real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(object_format, "payload_of", cancelled_meanwhile)
        outcome = start_read(store, into)
        assert proven.wait(60)
        assert outcome.cancelled()
        monkeypatch.setattr(object_format, "payload_of", real)
        assert read(store) == ROWS
        assert into == buffers(CHUNK_BLOCKS)


def test_a_dead_store_is_asked_three_times_and_then_left_alone(
    serve: Callable[[Behaviour], FaultServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(say(answer("503 Slow Down")))
    with object_store(server.url) as store:
        reasons = [refusal(store) for _ in range(50)]
        assert reasons == ["unavailable"] * 3 + ["tier_off"] * 47
        assert store.stats().failures == {"unavailable": 3, "tier_off": 47}
        assert store.stats().circuits_opened == 1
    assert len(server.requests) == 3
    assert caplog.text.count("left alone") == 1, "one line, not one per request"


def test_a_store_that_comes_back_is_found_by_one_probe(
    serve: Callable[[Behaviour], FaultServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_requests, "_RETRY_SECONDS", 10.0)
    now = [0.0]
    server = serve(say(answer("503 Slow Down")))
    store = ObjectStore(replace(SETTINGS, endpoint_url=server.url), ROW, CHUNK_BLOCKS, NAMESPACE, lambda: now[0])
    try:
        assert [refusal(store) for _ in range(4)][-1] == "tier_off"
        now[0] = 10.0
        assert [refusal(store) for _ in range(2)] == ["unavailable", "tier_off"], "the probe failed"
        now[0] = 29.0
        server.behave = say(part(BODY))
        assert refusal(store) == "tier_off", "twice the pause"
        now[0] = 30.0
        for _ in range(2):
            assert read(store) == ROWS
        assert len(server.requests) == 6
    finally:
        close(store)


def test_hung_reads_keep_no_thread_and_no_connection(serve: Callable[[Behaviour], FaultServer]) -> None:
    server = serve(hang)
    with object_store(server.url, replace(SETTINGS, deadline_seconds=0.05)) as store:
        threads = set(threading.enumerate())
        for _ in range(3):
            assert refusal(store) == "timeout"
            assert server.left.acquire(timeout=60)
        ours = {thread for thread in set(threading.enumerate()) - threads if "_serve" not in thread.name}
        assert ours == set()
        assert [thread.name for thread in threads if thread.name.startswith("kvbm")] == ["kvbm-object"]
        port = int(server.url.rsplit(":", 1)[1])
        peers = [c for c in psutil.Process().net_connections() if c.raddr and c.raddr.port == port]
        assert [c for c in peers if c.status == psutil.CONN_ESTABLISHED] == []


@pytest.mark.parametrize(
    ("behave", "reason"),
    [(say(answer("503 Slow Down")), "unavailable"), (say(answer("403 Forbidden")), "forbidden"), (hang, "timeout")],
    ids=["503", "403", "hang"],
)
def test_an_upload_that_fails_says_so_once_and_gives_its_space_back(
    serve: Callable[[Behaviour], FaultServer], monkeypatch: pytest.MonkeyPatch, behave: Behaviour, reason: str
) -> None:
    monkeypatch.setattr(object_module, "_UPLOAD_SECONDS", 0.2)
    server = serve(behave)
    with object_store(server.url) as store:
        refused = put(store, CHUNK, KEYS, ROWS)
        assert refused is not None
        assert refused.reason == reason
        assert store.stats().queued_bytes == 0
        assert store.stats().failures == {reason: 1}


def test_an_object_larger_than_the_queue_is_stored_all_the_same(serve: Callable[[Behaviour], FaultServer]) -> None:
    server = serve(hang)
    with object_store(server.url, replace(SETTINGS, upload_queue_bytes=len(BODY) - 1)) as store:
        outcomes = [start_write(store, key(number), KEYS, ROWS) for number in range(2)]
        assert [outcome.done() for outcome in outcomes] == [False, True], "one at a time"
        store.check()


def test_what_was_cancelled_may_be_claimed_twice(caplog: pytest.LogCaptureFixture) -> None:
    """By a read whose bytes have come too late, and again when it ends."""
    outcome: object_module.Outcome = Future()
    outcome.cancel()
    assert not object_module._claim(outcome)
    assert not object_module._claim(outcome)
    raced: object_module.Outcome = Future()
    raced.cancel()
    raced.set_running_or_notify_cancel()
    assert not object_module._claim(raced)
    assert not caplog.records


def test_a_store_that_hangs_holds_a_bounded_backlog_and_drops_the_rest(
    serve: Callable[[Behaviour], FaultServer],
) -> None:
    server = serve(hang)
    room = replace(SETTINGS, upload_queue_bytes=6 * len(BODY) + 1)
    with object_store(server.url, room) as store:
        outcomes = [start_write(store, key(number), KEYS, ROWS) for number in range(10)]
        assert [outcome.done() for outcome in outcomes] == [False] * 6 + [True] * 4
        assert {reason(outcome) for outcome in outcomes[6:]} == {"upload_backlog"}
        assert store.stats().queued_bytes == 6 * len(BODY)
        assert store.stats().failures == {"upload_backlog": 4}
        store.check()
        assert outcomes[5].cancel(), "it has not begun"
        assert store.stats().queued_bytes == 5 * len(BODY)
    assert {reason(outcome) for outcome in outcomes[:5]} == {"closed"}, "closing tells every upload that waits"
    assert store.stats().queued_bytes == 0
    assert len(server.requests) <= 4, "uploads at once"


def test_uploads_to_a_dead_store_are_not_even_copied(serve: Callable[[Behaviour], FaultServer]) -> None:
    server = serve(say(answer("503 Slow Down")))
    with object_store(server.url) as store:
        reasons = []
        for number in range(6):
            error = put(store, key(number), KEYS, ROWS)
            assert error is not None
            reasons.append(error.reason)
        assert reasons == ["unavailable"] * 3 + ["tier_off"] * 3
    assert len(server.requests) == 3


def test_a_change_of_weights_cancels_what_is_being_uploaded(serve: Callable[[Behaviour], FaultServer]) -> None:
    server = serve(hang)
    with object_store(server.url) as store:
        writing, reading = start_write(store, CHUNK, KEYS, ROWS), start_read(store, buffers(CHUNK_BLOCKS))
        store.forget()
        assert [reason(writing), reason(reading)] == ["forgotten"] * 2


def test_rows_that_change_after_a_change_of_weights_are_never_sent(
    serve: Callable[[Behaviour], FaultServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine re-uses the rows as soon as it has the outcome, be it while they are being copied."""
    server = serve(say(answer("404 Not Found")))
    with object_store(server.url) as store:
        copying, encode = threading.Event(), object_format.encode

        def forgotten_meanwhile(*arguments: object) -> bytearray:
            store.forget()
            assert not outcome.done(), "the rows are still being read"
            copying.set()
            return encode(*arguments)

        async def never(*arguments: object) -> None:
            sent.append(arguments)

        sent: list[object] = []
        monkeypatch.setattr(ObjectClient, "put", never)
        monkeypatch.setattr(object_format, "encode", forgotten_meanwhile)
        outcome = start_write(store, CHUNK, KEYS, ROWS)
        assert copying.wait(60)
        assert reason(outcome) == "forgotten"
    assert sent == []


def test_listing_starts_again_until_the_store_answers(
    serve: Callable[[Behaviour], FaultServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_requests, "_RETRY_SECONDS", 0.05)
    empty = b'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>'
    left = [answer("503 Slow Down")] * 5

    def recover(connection: socket.socket, request: str) -> None:
        connection.sendall(left.pop() if left else answer("200 OK", empty))

    server = serve(recover)
    with object_store(server.url) as store:
        assert list_all(store) == []
        assert store.stats().failures == {"unavailable": 5}
    assert len(server.requests) == 6


def test_closing_while_a_read_hangs_ends_it(serve: Callable[[Behaviour], FaultServer]) -> None:
    asked = threading.Event()

    def hang_and_tell(connection: socket.socket, request: str) -> None:
        asked.set()
        hang(connection, request)

    server = serve(hang_and_tell)
    with object_store(server.url, replace(SETTINGS, deadline_seconds=60.0)) as store:
        into = buffers(1)
        outcome = start_read(store, into)
        assert asked.wait(60)
        close(store)
        assert reason(outcome) == "closed"
        assert into == buffers(1)
