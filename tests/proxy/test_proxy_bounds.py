"""What one client or one engine can make the proxy hold, believe or repeat."""

from __future__ import annotations

import asyncio
import tracemalloc
from dataclasses import replace
from typing import cast

import orjson
import pytest
from dynamo_proxy.client_connection import ClientConnection
from dynamo_proxy.config import Limits
from dynamo_proxy.errors import UnknownEngineError
from dynamo_proxy.http1 import Request, RequestReader
from dynamo_proxy.token_memo import TokenMemo

from tests.proxy.proxy_fakes import (
    ANSWER,
    QUICK,
    Client,
    FakeEngine,
    RawEngine,
    answer_ok,
    ask,
    chat,
    get,
    post,
    proxy_before,
    run,
    wait_until,
)

# --- what a client can make it hold


def test_pipelined_own_answers_that_nobody_reads_are_not_piled_up() -> None:
    count = 4_000

    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy, Client.to(proxy.port) as client:
            client.writer.transport.pause_reading()
            client.send(get("/openapi.json") * count)
            await asyncio.sleep(0.5)
            (connection,) = proxy.front_end.clients
            assert connection._transport is not None
            assert connection._transport.get_write_buffer_size() < 2 << 20
            assert connection._reader.held_bytes < 1 << 20
            client.writer.transport.resume_reading()
            for _ in range(count):
                assert (await client.answer()).status == 200

    run(body())


def test_a_request_that_trickles_in_is_told_and_dropped() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        timeouts = replace(QUICK, client_idle_seconds=0.2)
        async with proxy_before(engine, timeouts=timeouts) as proxy, Client.to(proxy.port) as client:

            async def trickle() -> None:
                while True:
                    client.send(b"x-a: b\r\n")
                    await asyncio.sleep(0.05)

            client.send(b"GET /health HTTP/1.1\r\n")
            dripping = asyncio.ensure_future(trickle())
            answer = await asyncio.wait_for(client.answer(), 5)
            dripping.cancel()
            assert answer.status == 408

    run(body())


@pytest.mark.parametrize("reads", [False, True])
def test_a_client_that_stops_reading_gives_its_engine_back(reads: bool) -> None:
    size = 1 << 24

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        writer.write(bytes(size))
        await writer.drain()

    async def body() -> None:
        engine = await RawEngine(flood).start()
        timeouts = replace(QUICK, client_idle_seconds=0.3)
        async with proxy_before(engine, timeouts=timeouts) as proxy, Client.to(proxy.port) as client:
            client.writer.transport.pause_reading()
            client.send(get("/flood"))
            await wait_until(lambda: proxy.ledger.in_flight == 1)
            if not reads:
                await wait_until(lambda: proxy.ledger.in_flight == 0, "the engine is free")
                assert b'status="499"' in proxy.front_end.metrics()
                return
            client.writer.transport.resume_reading()
            left = size + len((await client.reader.readuntil(b"\r\n\r\n")) and b"")
            while left:  # about 1.6 s, five times the limit, but never silent
                left -= len(await client.reader.readexactly(min(left, 1 << 19)))
                await asyncio.sleep(0.05)

    run(body())


def test_a_body_in_tiny_chunks_costs_no_multiple_of_its_size() -> None:
    body_bytes = 1 << 17
    reader = RequestReader(Limits())
    reader.receive(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
    reader.next_event()
    pieces = b"2\r\nab\r\n" * 1024
    tracemalloc.start()
    try:
        for _ in range(body_bytes // 2048):
            reader.receive(pieces)
            assert reader.next_event() is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    reader.check()
    reader.receive(b"0\r\n\r\n")
    request = reader.next_event()
    assert isinstance(request, Request)
    assert request.body == b"ab" * (body_bytes // 2)
    assert peak < 4 * body_bytes


def test_turns_of_long_conversations_do_not_pin_every_prompt_they_had() -> None:
    memo = TokenMemo(max_nodes=10_000, max_tokens=50_000)
    for session in range(20):
        chain: list[int] = []
        for turn in range(20):
            chain.append(session * 1000 + turn)
            partial = -(session * 1000 + turn) - 1  # the last block of a prompt is its own
            memo.learn([*chain, partial], 256 * len(chain) + 10, range(1000 + 100 * turn), 0)
            memo.check()
    alive = {id(run): run for run, _ in memo._known.values()}
    assert sum(len(run.token_ids) for run in alive.values()) <= 50_000
    assert memo.recall(chain) is not None


def test_a_deeply_nested_message_does_not_end_the_tokenising() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy:
            proxy.knowledge.event_mask = 1
            for depth in range(240, 262):
                content = b"[" * depth + b"]" * depth
                text = b'{"model":"tiny","messages":[{"role":"user","content":%b}]}' % content
                assert (await ask(proxy.port, post("/v1/chat/completions", text))).status == 200
            await wait_until(lambda: proxy.tokens._queue.empty())
            await asyncio.sleep(0.05)
            proxy.tokens.check()

    run(body())


# --- what an engine can make it say or repeat


@pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/1.1"])
def test_a_decoded_answer_that_broke_is_not_made_to_look_whole(version: bytes) -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.transport.abort()

    async def body() -> None:
        engine = await RawEngine(half).start()
        async with proxy_before(engine) as proxy:
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await ask(proxy.port, get("/x").replace(b"HTTP/1.1", version))

    run(body())


def test_headers_of_ours_and_the_engines_address_are_not_taken_from_either_side() -> None:
    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        host = next(line[6:] for line in request.split(b"\r\n") if line.lower().startswith(b"host: "))
        writer.write(
            b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://" + host + b"/there?a=1\r\n"
            b"X-Dynamo-Engine: me\r\nx-kept: 1\r\ncontent-length: 0\r\n\r\n"
        )

    async def body() -> None:
        engine = await RawEngine(redirect).start()
        async with proxy_before(engine) as proxy, Client.to(proxy.port) as client:
            client.send(get("/here/", "X-Dynamo-Engine: engine-7", "x-dynamo-anything: 1"))
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert head.lower().count(b"x-dynamo-engine") == 1
            assert b"location: /there?a=1\r\n" in head.lower()
            assert str(engine.port).encode() not in head
            assert b"x-dynamo" not in engine.requests[0].lower()

    run(body())


def test_a_connection_that_began_to_answer_was_not_stale() -> None:
    async def body() -> None:
        async def stutter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
            if len(engine.requests) == 1:
                writer.write(ANSWER)
                return
            writer.write(b"HTTP/1.1 200")
            await writer.drain()
            await asyncio.sleep(0.02)
            writer.transport.abort()

        engine = await RawEngine(stutter).start()
        async with proxy_before(engine) as proxy:
            assert (await ask(proxy.port, post("/v1/completions", {"prompt": "a"}))).status == 200
            assert (await ask(proxy.port, post("/v1/completions", {"prompt": "a"}))).status == 502
            assert len(engine.requests) == 2

    run(body())


def test_a_connection_whose_request_was_not_taken_whole_is_not_used_again() -> None:
    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        with_body = b"POST" in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n" if with_body else ANSWER)
        await writer.drain()
        if not with_body:
            writer.close()

    connections: list[asyncio.StreamWriter] = []

    async def body() -> None:
        server = await asyncio.start_server(early, "127.0.0.1", 0)
        engine = FakeEngine()
        engine.port = server.sockets[0].getsockname()[1]
        async with proxy_before(engine) as proxy:
            before = len(connections)
            big = post("/x", bytes(24 << 20))
            assert (await ask(proxy.port, big)).status == 413
            assert (await ask(proxy.port, get("/y"))).body == b"ok"
            assert len(connections) >= before + 2
        for writer in connections:
            writer.close()
        server.close()
        await asyncio.sleep(0)

    run(body())


@pytest.mark.parametrize(
    ("head", "learns"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n", False),
        (b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/event-stream\r\n", False),
        (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n", True),
    ],
)
def test_prefill_speed_is_learnt_from_first_tokens_only(head: bytes, learns: bool) -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        await asyncio.sleep(0.1)
        writer.write(head + b"content-length: 2\r\n\r\nok")

    async def body() -> None:
        engine = await RawEngine(slow).start()
        async with proxy_before(engine) as proxy:
            await ask(proxy.port, post("/v1/chat/completions", chat("w" * 8000)))
            assert proxy.router.state.learner._seen == int(learns)

    run(body())


# --- engines that leave


def test_an_engine_that_is_leaving_cannot_be_resumed_or_left_half_removed() -> None:
    async def body() -> None:
        first, second = await FakeEngine().start(), await FakeEngine().start()
        async with proxy_before(first, second) as proxy:
            leaving = proxy.registry.at(1)
            going = [asyncio.ensure_future(proxy.remove_engine(leaving)) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(UnknownEngineError):
                proxy.registry.find(second.address)
            fresh = proxy.add_engine(second.address)  # a new life, not the one that goes
            assert fresh is not leaving
            ended = await asyncio.gather(*going, return_exceptions=True)
            assert [end for end in ended if end is not None and not isinstance(end, UnknownEngineError)] == []
            await wait_until(lambda: fresh.takes_requests, "the new life is ready")
            assert proxy.monitor.watches[fresh.slot].engine is fresh
            assert orjson.loads((await ask(proxy.port, get("/health"))).body)["status"] == "ready"

    run(body())


# --- what happens to the connection and the load afterwards


@pytest.mark.parametrize(
    "first",
    [
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
        ANSWER + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil",
    ],
    ids=["close", "1.0", "surplus"],
)
def test_a_connection_that_should_end_carries_nothing_more(first: bytes) -> None:
    async def body() -> None:
        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
            writer.write(first if len(engine.requests) == 1 else ANSWER)

        engine = await RawEngine(script).start()
        async with proxy_before(engine) as proxy:
            before = engine.connections
            assert (await ask(proxy.port, get("/a"))).body == b"ok"
            assert (await ask(proxy.port, get("/b"))).body == b"ok"
            probes = engine.connections - before
            assert probes >= 2
            assert not any(b"retries_total{" in line for line in proxy.front_end.metrics().splitlines())

    run(body())


def test_the_prefill_stops_counting_at_the_first_token() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        engine.hold = asyncio.Event()
        async with proxy_before(engine) as proxy, Client.to(proxy.port) as client:
            client.send(post("/v1/chat/completions", chat("word " * 500, stream=True)))
            await client.head()
            load = proxy.ledger.load(0)
            assert (load.in_flight, load.pending_tokens) == (1, 0)
            assert load.active_tokens > 100
            engine.hold.set()

    run(body())


class FullSocket:
    """A client's transport whose buffer is over its mark at every write (kernel buffers are not so exact)."""

    def __init__(self) -> None:
        self.protocol: ClientConnection
        self.sent = b""

    def write(self, data: bytes) -> None:
        self.sent += data
        self.protocol.pause_writing()

    def get_extra_info(self, name: str) -> None: ...
    def set_write_buffer_limits(self, high: int) -> None: ...
    def get_write_buffer_size(self) -> int:
        return len(self.sent)

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def abort(self) -> None:
        self.protocol.connection_lost(None)


def test_an_engine_connection_whose_answer_filled_its_client_goes_back_reading() -> None:
    async def body() -> None:
        engine = await RawEngine(answer_ok).start()
        async with proxy_before(engine) as proxy:
            socket = FullSocket()
            socket.protocol = ClientConnection(proxy.front_end, proxy.config.limits, QUICK)
            socket.protocol.connection_made(cast(asyncio.Transport, socket))
            socket.protocol.data_received(get("/full"))
            await wait_until(lambda: socket.sent.endswith(b"ok"))
            await asyncio.sleep(0)
            proxy.check()
            assert (await asyncio.wait_for(ask(proxy.port, get("/next")), 5)).body == b"ok"
            socket.abort()

    run(body())
