"""The data plane over real sockets: splicing, order, aborts, limits and back-pressure."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import cast

import orjson
import pytest
from dynamo_proxy.config import Limits
from dynamo_proxy.exchange import Exchange

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


def test_a_stream_is_spliced_and_tells_its_engine() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy:
            answer = await ask(proxy.port, post("/v1/chat/completions", chat(stream=True)))
            assert answer.status == 200
            assert answer.body.count(b"data: ") == 4
            assert answer.headers["x-dynamo-engine"] == "engine-0"
            assert answer.headers["x-dynamo-matched-tokens"] == "0"
            assert str(engine.port) not in repr(answer.headers)

    run(body())


def test_requests_of_one_connection_are_answered_in_order() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy, Client.to(proxy.port) as client:
            requests = [post("/v1/chat/completions", chat("x" * number)) for number in range(20)]
            client.send(b"".join(requests) + get("/health") + requests[3])
            lengths = [(await client.answer()).json()["received_bytes"] for _ in range(20)]
            assert lengths == sorted(lengths)
            assert (await client.answer()).json()["status"] == "ready"
            assert (await client.answer()).status == 200
            assert len(engine.requests) == 21
            assert proxy.registry.at(0).pool._open  # kept alive

    run(body())


def test_a_chunked_request_in_small_pieces_reaches_the_engine_whole() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy, Client.to(proxy.port) as client:
            payload = orjson.dumps(chat("chunky"))
            client.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: p\r\ntransfer-encoding: chunked\r\n\r\n")
            for letter in payload:
                client.send(b"1\r\n%c\r\n" % letter)
                await asyncio.sleep(0)
            client.send(b"0\r\n\r\n")
            assert (await client.answer()).json()["received_bytes"] == len(payload)
            _, headers, _ = engine.requests[-1]
            assert headers["Content-Length" if "Content-Length" in headers else "content-length"] == str(len(payload))

    run(body())


def test_expect_continue_is_answered_and_does_not_reach_the_engine() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy, Client.to(proxy.port) as client:
            head, _, payload = post(
                "/v1/completions", {"model": "tiny", "prompt": "a"}, "expect: 100-continue"
            ).partition(b"\r\n\r\n")
            client.send(head + b"\r\n\r\n")
            assert (await client.head()).status == 100
            client.send(payload)
            assert (await client.answer()).status == 200
            assert "expect" not in {name.lower() for name in engine.requests[-1][1]}

    run(body())


def test_a_ten_megabyte_body_passes_and_a_larger_one_is_refused() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine, limits=Limits(max_body_bytes=12 << 20)) as proxy:
            request = post("/v1/chat/completions", chat("y" * (10 << 20)))
            assert (await ask(proxy.port, request)).json()["received_bytes"] > 10 << 20
            answer = await ask(proxy.port, post("/v1/chat/completions", chat("y" * (13 << 20))))
            assert (answer.status, answer.json()["error"]["code"]) == (413, "body_too_large")
            assert answer.headers["connection"] == "close"

    run(body())


def test_malformed_bytes_get_400_and_the_connection_ends() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy, Client.to(proxy.port) as client:
            client.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n")
            answer = await client.answer()
            assert answer.status == 400
            assert answer.json()["error"]["type"] == "invalid_request_error"
            assert await client.reader.read() == b""
            assert not engine.requests

    run(body())


def test_http_1_0_clients_get_plain_bytes() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy, Client.to(proxy.port) as client:
            client.send(post("/v1/chat/completions", chat(stream=True)).replace(b"HTTP/1.1", b"HTTP/1.0"))
            answer = await client.answer()
            assert "transfer-encoding" not in answer.headers
            assert answer.body.startswith(b"data: ")
            assert answer.body.endswith(b"data: [DONE]\n\n")

    run(body())


@pytest.mark.parametrize("when", ["before the first byte", "mid-stream"])
def test_a_client_that_leaves_aborts_its_engine(when: str) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        if when == "mid-stream":
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n")
        assert await reader.read() == b""  # the proxy hangs up

    async def body() -> None:
        engine = await RawEngine(silent).start()
        async with proxy_before(engine) as proxy:
            async with Client.to(proxy.port) as client:
                client.send(post("/v1/chat/completions", chat(stream=True)))
                if when == "mid-stream":
                    await client.head()
                else:
                    await wait_until(lambda: bool(engine.requests))
                assert proxy.ledger.in_flight == 1
            await wait_until(lambda: proxy.ledger.in_flight == 0, "lease released")
            await wait_until(lambda: engine.lost > 0, "engine saw the hang-up")
            assert b'status="499"' in proxy.front_end.metrics()

    run(body())


def test_a_client_that_leaves_while_its_engine_is_dialled_leaves_no_connection_behind() -> None:
    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        await reader.read()

    async def body() -> None:
        engine = await RawEngine(mute).start()
        async with proxy_before(engine) as proxy:
            for turns in range(12):
                async with Client.to(proxy.port) as client:
                    client.send(post("/v1/completions", {"prompt": "a"}))
                    for _ in range(10_000):
                        if any(connection._running for connection in proxy.front_end.clients):
                            break
                        await asyncio.sleep(0)
                    for _ in range(turns):  # of the loop, since the dial began
                        await asyncio.sleep(0)
                    for connection in proxy.front_end.clients:
                        assert connection._transport is not None
                        connection._transport.abort()
                    await wait_until(lambda: not proxy.front_end.clients)
            await wait_until(lambda: not proxy.registry.at(0).pool._open, "no connection is left")

    run(body())


def test_a_slow_client_does_not_make_the_proxy_hold_the_answer() -> None:
    total = 64 << 20
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % total)
        while sent < total:
            writer.write(bytes(65536))
            sent += 65536
            await writer.drain()

    async def body() -> None:
        engine = await RawEngine(flood).start()
        async with proxy_before(engine) as proxy, Client.to(proxy.port) as client:
            client.writer.transport.pause_reading()
            client.send(get("/flood"))
            await wait_until(lambda: sent > 0)
            before = -1
            while sent != before:  # until the engine is stopped by back-pressure
                before = sent
                await asyncio.sleep(0.1)
            assert sent < total // 2
            (connection,) = proxy.front_end.clients
            assert connection._transport is not None
            assert connection._transport.get_write_buffer_size() < 2 << 20
            proxy.check()
            client.writer.transport.resume_reading()
            answer = await client.answer()
            assert len(answer.body) == total
            assert (await ask(proxy.port, get("/health"))).status == 200

    run(body())


def test_an_engine_that_a_slow_client_stopped_is_not_late_when_it_may_go_on() -> None:
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (64 << 20) + bytes(64 << 20))
        await writer.drain()

    async def body() -> None:
        engine, timeouts = await RawEngine(flood).start(), replace(QUICK, idle_seconds=0.2)
        async with proxy_before(engine, timeouts=timeouts) as proxy:
            async with Client.to(proxy.port) as client:
                client.writer.transport.pause_reading()
                client.send(get("/flood"))
                await wait_until(lambda: any(c.flow.writing_paused for c in proxy.front_end.clients))
                (connection,) = proxy.front_end.clients
                exchange = cast(Exchange, connection._running)
                await wait_until(lambda: connection.loop.time() - connection._heard > 1)
                connection.flow.resume_writing()
                assert exchange.seconds_left() > 0
                connection.flow.pause_writing()
            await wait_until(lambda: not proxy.front_end.clients)

    run(body())


def test_a_client_that_pipelines_without_reading_is_held() -> None:
    release = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        await release.wait()
        writer.write(ANSWER)

    async def body() -> None:
        engine = await RawEngine(slow).start()
        async with proxy_before(engine) as proxy, Client.to(proxy.port) as client:
            request = post("/v1/completions", {"prompt": "z" * 20_000})
            for _ in range(400):
                client.send(request)
            await wait_until(lambda: bool(engine.requests))
            await asyncio.sleep(0.1)
            (connection,) = proxy.front_end.clients
            assert connection._reader.held_bytes < 1 << 20
            release.set()
            for _ in range(400):
                assert (await client.answer()).body == b"ok"

    run(body())


def test_a_client_that_never_finishes_its_head_is_told_and_dropped() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine, timeouts=replace(QUICK, client_idle_seconds=0.1)) as proxy:
            answer = await ask(proxy.port, b"GET /hea")
            assert answer.status == 408
            async with Client.to(proxy.port) as idle:
                assert await idle.reader.read() == b""

    run(body())


def test_upgrades_and_named_headers_stop_at_the_proxy() -> None:
    async def body() -> None:
        engine = await RawEngine(answer_ok).start()
        async with proxy_before(engine) as proxy:
            await ask(
                proxy.port,
                get("/x", "connection: upgrade, x-private", "upgrade: h2c", "x-private: 1", "x-kept: 2"),
            )
            (seen,) = engine.requests
            assert b"x-kept: 2" in seen
            assert b"x-private" not in seen
            assert b"upgrade" not in seen
            assert seen.count(b"host: ") == 1
            assert f"host: 127.0.0.1:{engine.port}".encode() in seen

    run(body())
