"""Services that refuse, hang, trickle, lie and die: a miss with its reason, no byte handed out, nothing left behind.

No clock is asserted. A read that came back although the service would have gone on for ever has kept its deadline, and
the service then sees its peer hang up.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil
import pytest

from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers import object as object_module
from dynamo_connectors.tiers import object_format, object_requests, object_upkeep
from dynamo_connectors.tiers.object import ObjectStore, RowRead
from dynamo_connectors.tiers.object_circuit import Circuit
from tests.tiers.object_stores import (
    CHUNK,
    CHUNK_BLOCKS,
    KEYS,
    NAMESPACE,
    ROW,
    ROWS,
    SETTINGS,
    buffers,
    key,
    list_all,
    object_store,
    put,
    refusal,
)
from tests.tiers.s3_servers import CREDENTIALS, Behaviour, FaultServer, answer, hang, part, say, trickle

SOON = replace(SETTINGS, deadline_seconds=0.2)
BODY = bytes(object_format.encode(NAMESPACE.digest, KEYS, ROWS, ROW))
STRIDE = object_format.row_stride(ROW)
OTHER = bytes(object_format.encode(NAMESPACE.digest, KEYS[::-1], ROWS, ROW))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
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


def read_into_marked(store: ObjectStore) -> str:
    """Why reading the whole chunk was refused; asserts that no byte was handed out."""
    into = buffers(CHUNK_BLOCKS)
    reason = refusal(
        lambda: store.read_rows(CHUNK, [RowRead(row, KEYS[row], into[row]) for row in range(CHUNK_BLOCKS)])
    )
    assert into == buffers(CHUNK_BLOCKS), "bytes of a failed read were handed out"
    return reason


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
        assert read_into_marked(store) == reason
        assert store.stats().failures[reason] == 1
        assert [line for line in server.requests if line.startswith("GET")] == server.requests[:1], "asked once"
        server.behave = say(part(BODY))
        into = buffers(CHUNK_BLOCKS)
        store.read_rows(CHUNK, [RowRead(row, KEYS[row], into[row]) for row in range(CHUNK_BLOCKS)])
        assert into == ROWS, "one failure does not close the store"


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
        assert read_into_marked(store) == "deadline"
        assert store.stats().failures == {"deadline": 1}
        assert server.left.acquire(timeout=60), "the connection was left open"


def test_a_service_that_nobody_runs_is_a_miss(serve: Callable[[Behaviour], FaultServer]) -> None:
    server = serve(hang)
    server.close()
    with object_store(server.url) as store:
        assert read_into_marked(store) == "unreachable"


def test_a_name_that_nobody_knows_is_a_miss() -> None:
    with object_store("http://no-such-host.invalid") as store:
        assert read_into_marked(store) == "unreachable"


def test_a_peer_that_accepts_nothing_is_left_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, socket.socket() as filler:
        filler.connect(listener.getsockname())  # the queue is full: the next SYN gets no answer
        with object_store(f"http://127.0.0.1:{listener.getsockname()[1]}", SOON) as store:
            assert read_into_marked(store) == "deadline"


def test_no_time_left_is_a_miss_without_a_request(serve: Callable[[Behaviour], FaultServer]) -> None:
    server = serve(hang)
    with object_store(server.url) as store:
        reason = refusal(lambda: store.read_rows(CHUNK, [RowRead(0, KEYS[0], buffers(1)[0])], deadline=0.0))
        assert reason == "deadline"
    assert server.requests == []


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
        rows = [RowRead(row, KEYS[row], into[row]) for row in range(CHUNK_BLOCKS)]
        assert refusal(lambda: store.read_rows(CHUNK, rows)) == "deadline"
        given_up.set()
        assert sent.wait(60)
        server.behave = say(part(BODY))
        again = buffers(CHUNK_BLOCKS)
        store.read_rows(CHUNK, [RowRead(row, KEYS[row], again[row]) for row in range(CHUNK_BLOCKS)])
        assert again == ROWS
        assert into == buffers(CHUNK_BLOCKS)


def test_a_dead_store_is_asked_three_times_and_then_left_alone(
    serve: Callable[[Behaviour], FaultServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(say(answer("503 Slow Down")))
    with object_store(server.url) as store:
        reasons = [read_into_marked(store) for _ in range(50)]
        assert reasons == ["unavailable"] * 3 + ["circuit_open"] * 47
        assert store.stats().failures == {"unavailable": 3, "circuit_open": 47}
        assert store.stats().circuits_opened == 1
    assert len(server.requests) == 3
    assert caplog.text.count("left alone") == 1, "one line, not one per request"


def test_a_store_that_comes_back_is_found_by_one_probe(
    serve: Callable[[Behaviour], FaultServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_requests, "Circuit", lambda: Circuit(first_pause_seconds=10.0))
    now = [0.0]
    server = serve(say(answer("503 Slow Down")))
    store = ObjectStore(replace(SETTINGS, endpoint_url=server.url), ROW, CHUNK_BLOCKS, NAMESPACE, lambda: now[0])
    try:
        assert [read_into_marked(store) for _ in range(4)][-1] == "circuit_open"
        now[0] = 10.0
        assert [read_into_marked(store) for _ in range(2)] == ["unavailable", "circuit_open"], "the probe failed"
        now[0] = 29.0
        server.behave = say(part(BODY))
        assert read_into_marked(store) == "circuit_open", "twice the pause"
        now[0] = 30.0
        for _ in range(2):
            into = buffers(CHUNK_BLOCKS)
            store.read_rows(CHUNK, [RowRead(row, KEYS[row], into[row]) for row in range(CHUNK_BLOCKS)])
            assert into == ROWS
        assert len(server.requests) == 6
    finally:
        store.close()


def test_hung_reads_keep_no_thread_and_no_connection(serve: Callable[[Behaviour], FaultServer]) -> None:
    server = serve(hang)
    with object_store(server.url, replace(SETTINGS, deadline_seconds=0.05)) as store:
        threads = set(threading.enumerate())
        for _ in range(3):
            assert read_into_marked(store) == "deadline"
            assert server.left.acquire(timeout=60)
        ours = {thread for thread in set(threading.enumerate()) - threads if "_serve" not in thread.name}
        assert ours == set()
        assert [thread.name for thread in threads if thread.name.startswith("kvbm")] == ["kvbm-object"]
        port = int(server.url.rsplit(":", 1)[1])
        peers = [c for c in psutil.Process().net_connections() if c.raddr and c.raddr.port == port]
        assert [c for c in peers if c.status == psutil.CONN_ESTABLISHED] == []


@pytest.mark.parametrize(
    ("behave", "reason"),
    [(say(answer("503 Slow Down")), "unavailable"), (say(answer("403 Forbidden")), "forbidden"), (hang, "deadline")],
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


def test_a_store_that_hangs_holds_a_bounded_backlog_and_drops_the_rest(
    serve: Callable[[Behaviour], FaultServer],
) -> None:
    server = serve(hang)
    ended: list[tuple[int, StoreError | None]] = []
    room = replace(SETTINGS, upload_queue_bytes=6 * len(BODY) + 1)
    with object_store(server.url, room) as store:
        for number in range(10):
            store.put_chunk(key(number), KEYS, ROWS, lambda error, number=number: ended.append((number, error)))
        assert [(number, error and error.reason) for number, error in ended] == [
            (number, "upload_backlog") for number in range(6, 10)
        ]
        assert store.stats().queued_bytes == 6 * len(BODY)
        assert store.stats().failures == {"upload_backlog": 4}
        store.check()
    assert sorted(number for number, _ in ended) == list(range(10)), "closing tells every upload that waits"
    assert {error and error.reason for number, error in ended if number < 6} == {"closed"}
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
        assert reasons == ["unavailable"] * 3 + ["circuit_open"] * 3
    assert len(server.requests) == 3


def test_a_change_of_weights_cancels_what_is_being_uploaded(serve: Callable[[Behaviour], FaultServer]) -> None:
    server = serve(hang)
    reasons: list[str | None] = []
    ended = threading.Event()

    def done(error: StoreError | None) -> None:
        reasons.append(error and error.reason)
        ended.set()

    with object_store(server.url) as store:
        store.put_chunk(CHUNK, KEYS, ROWS, done)
        store.forget()
        assert ended.wait(60)
        assert reasons == ["forgotten"]


def test_listing_starts_again_until_the_store_answers(
    serve: Callable[[Behaviour], FaultServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_requests, "Circuit", lambda: Circuit(first_pause_seconds=0.05))
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
    reasons: list[str] = []
    with object_store(server.url, replace(SETTINGS, deadline_seconds=60.0)) as store:
        reader = threading.Thread(target=lambda: reasons.append(read_into_marked(store)))
        reader.start()
        assert asked.wait(60)
        store.close()
        reader.join()
    assert reasons == ["closed"]
