"""Engines that fail: before the first byte (retried), after it (ended honestly), silently, or repeatedly."""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import replace

import orjson
import pytest

from tests.proxy.proxy_fakes import QUICK, Client, FakeEngine, RawEngine, ask, chat, get, post, proxy_before, run

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


async def _ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
    writer.write(ANSWER)


async def _die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
    writer.transport.abort()


def test_an_engine_that_dies_before_the_first_byte_costs_the_client_nothing() -> None:
    async def head_then_die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        await writer.drain()
        writer.transport.abort()

    async def body() -> None:
        dying, good = await RawEngine(head_then_die).start(), await RawEngine(_ok).start()
        async with proxy_before(dying, good, router_mode="round-robin") as proxy:
            for _ in range(6):
                answer = await ask(proxy.port, post("/v1/chat/completions", chat()))
                assert (answer.body, answer.headers["x-dynamo-engine"]) == (b"ok", "engine-1")
            assert len(dying.requests) > 0
            assert b'dynamo_router_retries_total{reason="connection_lost"}' in proxy.front_end.metrics()

    run(body())


@pytest.mark.parametrize("status", [502, 503])
def test_a_refusing_engine_is_passed_over_and_the_last_refusal_is_shown(status: int) -> None:
    async def body() -> None:
        bad, good = await FakeEngine().start(), await FakeEngine().start()
        bad.status = status
        async with proxy_before(bad, good, router_mode="round-robin") as proxy:
            answers = [await ask(proxy.port, post("/v1/chat/completions", chat())) for _ in range(4)]
            assert [answer.status for answer in answers] == [200] * 4
            assert len(bad.requests) == 2
            good.status = status
            assert (await ask(proxy.port, post("/v1/chat/completions", chat()))).status == status
            assert f'reason="status_{status}"'.encode() in proxy.front_end.metrics()

    run(body())


def test_what_fails_inside_an_engine_gets_one_other_and_no_more() -> None:
    """vLLM that shuts down answers 500; so does an engine that a request itself breaks, which must not see them all."""

    async def body() -> None:
        engines = [await FakeEngine().start() for _ in range(3)]
        async with proxy_before(*engines, router_mode="round-robin") as proxy:
            engines[0].status = 500
            assert (await ask(proxy.port, post("/v1/chat/completions", chat()))).status == 200
            assert [len(engine.requests) for engine in engines] == [1, 1, 0]
            engines[1].status, engines[2].status = 503, 500
            assert (await ask(proxy.port, post("/v1/chat/completions", chat()))).status == 500
            assert [len(engine.requests) for engine in engines] == [2, 2, 1], "once, whatever others said between"
            for engine in engines:
                engine.status = 500
            assert (await ask(proxy.port, post("/v1/chat/completions", chat()))).status == 500
            assert sum(len(engine.requests) for engine in engines) == 7

    run(body())


def test_a_500_of_a_route_that_may_have_done_half_of_its_work_is_not_asked_again() -> None:
    async def body() -> None:
        engines = [await FakeEngine().start() for _ in range(2)]
        for engine in engines:
            engine.status = 500
        async with proxy_before(*engines) as proxy:
            assert (await ask(proxy.port, post("/v1/files", {"a": 1}))).status == 500
            assert sum(len(engine.requests) for engine in engines) == 1

    run(body())


def test_when_every_engine_fails_the_client_hears_502_and_each_was_tried_once() -> None:
    async def body() -> None:
        engines = [await RawEngine(_die).start() for _ in range(3)]
        async with proxy_before(*engines) as proxy:
            answer = await ask(proxy.port, post("/v1/chat/completions", chat()))
            assert (answer.status, answer.json()["error"]["code"]) == (502, "engine_failed")
            assert [len(engine.requests) for engine in engines] == [1, 1, 1]

    run(body())


def test_a_silent_engine_is_left_at_the_first_byte_deadline() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        await reader.read()

    async def body() -> None:
        mute, good = await RawEngine(silent).start(), await RawEngine(_ok).start()
        timeouts = replace(QUICK, first_byte_seconds=0.1)
        async with proxy_before(mute, good, router_mode="round-robin", timeouts=timeouts) as proxy:
            assert [(await ask(proxy.port, post("/v1/completions", {"prompt": "a"}))).status for _ in range(2)] == [
                200,
                200,
            ]
            assert len(mute.requests) == 1
            await good.stop()
            proxy.registry.at(1).draining = True
            assert (await ask(proxy.port, post("/v1/completions", {"prompt": "a"}))).status == 504

    run(body())


def test_an_engine_that_dies_mid_stream_ends_it_with_an_error_event() -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.write(b"9\r\ndata: 1\n\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.transport.abort()

    async def body() -> None:
        engine = await RawEngine(half).start()
        async with proxy_before(engine) as proxy, Client.to(proxy.port) as client:
            client.send(post("/v1/chat/completions", chat(stream=True)))
            answer = await client.answer()
            first, second = answer.body.strip().split(b"\n\n")
            assert first == b"data: 1"
            assert orjson.loads(second.removeprefix(b"data: "))["error"]["code"] == "engine_lost"
            client.send(get("/openapi.json"))  # its client may have sent the next request already
            assert (await client.answer()).status == 200
            assert b'reason="connection_lost",status="200"' in proxy.front_end.metrics()

    run(body())


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n9\r\ndata",
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf",
    ],
)
def test_an_answer_cut_inside_a_frame_is_never_made_to_look_whole(start: bytes) -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        writer.write(start)
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.transport.abort()

    async def body() -> None:
        engine = await RawEngine(half).start()
        async with proxy_before(engine) as proxy, Client.to(proxy.port) as client:
            client.send(post("/v1/chat/completions", chat(stream=True)))
            await client.head()
            assert await client.reader.read() == start.partition(b"\r\n\r\n")[2]

    run(body())


def test_an_answer_without_a_length_passes() -> None:
    async def until_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhello ")
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.write(b"there")
        writer.close()

    async def body() -> None:
        engine = await RawEngine(until_close).start()
        async with proxy_before(engine) as proxy:
            answer = await ask(proxy.port, get("/anything"))
            assert (answer.body, answer.headers["connection"]) == (b"hello there", "close")

    run(body())


def test_a_stale_connection_is_redone_unseen() -> None:
    async def answer_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        if len(engine_requests) % 2:  # a reused connection dies under its second request
            writer.transport.abort()
        else:
            writer.write(ANSWER)
        engine_requests.append(request)

    engine_requests: list[bytes] = []

    async def body() -> None:
        engine = await RawEngine(answer_and_close).start()
        async with proxy_before(engine) as proxy:
            answers = [await ask(proxy.port, post("/v1/completions", {"prompt": "a"})) for _ in range(4)]
            assert [answer.status for answer in answers] == [200] * 4
            assert b'retries_total{reason="stale_connection"}' in proxy.front_end.metrics()

    run(body())


def test_a_lost_answer_without_a_length_is_a_reset_not_an_end() -> None:
    async def reset_midway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhello ")
        await writer.drain()
        await asyncio.sleep(0.02)
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def body() -> None:
        engine = await RawEngine(reset_midway).start()
        async with proxy_before(engine) as proxy:
            with pytest.raises(ConnectionResetError):
                await ask(proxy.port, get("/anything"))

    run(body())
