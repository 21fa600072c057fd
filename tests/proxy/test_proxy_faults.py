"""Mistakes of our own, put in on purpose: each ends its request and no other, and leaves nothing open."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import NoReturn

import pytest
from dynamo_proxy.client_connection import ClientConnection
from dynamo_proxy.config import Routing
from dynamo_proxy.exchange import Exchange
from dynamo_proxy.intake import Intake
from dynamo_proxy.prefill_leg import PrefillLeg
from dynamo_proxy.server import ProxyServer

from .proxy_fakes import QUICK, Client, FakeEngine, RawEngine, ask, chat, post, proxy_before, run, sse_chunk, wait_until
from .test_proxy_disaggregation import LONG, one_and_one
from .token_engine import TokenEngine

ROUTE = "/v1/chat/completions"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def mistaken(*_: object, **__: object) -> NoReturn:
    raise TypeError("put in by a test")


async def _die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
    writer.transport.abort()


async def _keep_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
    await reader.read(1)  # until the proxy hangs up


async def _begin_and_die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
    event = sse_chunk("word")
    writer.write(HEAD + b"%x\r\n%b\r\n" % (len(event), event))
    await writer.drain()
    writer.transport.abort()


async def _begin_and_hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
    event = sse_chunk("word")
    writer.write(HEAD + b"%x\r\n%b\r\n" % (len(event), event))
    await reader.read(1)


def nothing_is_left(proxy: ProxyServer, caplog: pytest.LogCaptureFixture, faults: int = 1) -> None:
    assert proxy.ledger.in_flight == 0
    assert all(connection.sink is None for engine in proxy.registry for connection in engine.pool._open)
    assert all(client._running is None for client in proxy.front_end.clients)
    assert f"dynamo_router_internal_errors_total {faults}.0".encode() in proxy.front_end.metrics()
    told = [record for record in caplog.records if record.exc_info]
    assert len(told) == faults, caplog.text
    assert caplog.text.count("TypeError: put in by a test") == faults
    proxy.check()


@pytest.mark.parametrize("place", ["_next_engine", "_attempt", "on_dialled", "on_lost"])
def test_a_mistake_before_the_first_byte_is_a_500(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        engine = await RawEngine(_die).start()
        async with proxy_before(engine) as proxy, Client.to(proxy.port) as client:
            with monkeypatch.context() as patch:
                patch.setattr(Exchange, place, mistaken)
                client.send(post(ROUTE, chat()))
                answer = await client.answer()
            assert (answer.status, answer.json()["error"]["code"]) == (500, "internal_error")
            nothing_is_left(proxy, caplog)
            client.send(post(ROUTE, chat()))  # the connection and the proxy go on
            assert (await client.answer()).status == 502

    run(body())


@pytest.mark.parametrize("place", ["_broken", "_resume", "_lost"])
def test_a_mistake_when_an_engine_is_lost_in_its_answer_cuts_that_answer_and_no_other(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        dying, steady = await RawEngine(_begin_and_die).start(), await FakeEngine().start()
        hold = steady.hold = asyncio.Event()
        async with proxy_before(dying, steady, router_mode="round-robin") as proxy:
            monkeypatch.setattr(Exchange, place, mistaken)
            async with Client.to(proxy.port) as one, Client.to(proxy.port) as other:
                for client in (one, other):
                    client.send(post(ROUTE, chat(stream=True)))
                heads = [await client.head() for client in (one, other)]
                cut, whole = (one, other) if heads[0].headers["x-dynamo-engine"] == "engine-0" else (other, one)
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    [chunk async for chunk in cut.chunks()]
                await wait_until(lambda: proxy.ledger.in_flight == 1)
                hold.set()
                assert b"".join([chunk async for chunk in whole.chunks()]).endswith(b"[DONE]\n\n")
            nothing_is_left(proxy, caplog)

    run(body())


def test_a_stream_on_tape_ends_with_an_error_that_its_client_can_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        engine = await TokenEngine().start()
        engine.break_after = 3
        async with proxy_before(engine) as proxy, Client.to(proxy.port) as client:
            monkeypatch.setattr("dynamo_proxy.stream_tape.plan_rest", mistaken)
            client.send(post(ROUTE, chat(stream=True, max_tokens=9)))
            await client.head()
            said = b"".join([chunk async for chunk in client.chunks()])
            assert b'"type":"engine_error"' in said
            assert b"[DONE]" not in said
            nothing_is_left(proxy, caplog)

    run(body())


@pytest.mark.parametrize("begun", [False, True])
def test_a_mistake_of_a_timer(begun: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        engine = await RawEngine(_begin_and_hang if begun else _keep_silent).start()
        quick = replace(QUICK, first_byte_seconds=0.2, idle_seconds=0.2)
        async with proxy_before(engine, timeouts=quick) as proxy, Client.to(proxy.port) as client:
            monkeypatch.setattr(Exchange, "seconds_left", mistaken)
            client.send(post(ROUTE, chat(stream=True)))
            if begun:
                await client.head()
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    [chunk async for chunk in client.chunks()]
            else:
                assert (await client.answer()).status == 500
            await wait_until(lambda: engine.lost == 1 or not engine._tasks, "the engine's connection is closed")
            nothing_is_left(proxy, caplog)

    run(body())


@pytest.mark.parametrize("place", ["on_dialled", "on_end", "_late"])
def test_a_mistake_in_the_prefill_half_ends_the_whole(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        routing = Routing(prefill_min_tokens=100, prefill_seconds=0.2)
        async with one_and_one(routing=routing) as (proxy, prefill, decode):
            prefill.how_prefill = "hang" if place == "_late" else "ticket"
            monkeypatch.setattr(PrefillLeg, place, mistaken)
            assert (await ask(proxy.port, post(ROUTE, chat(LONG)))).status == 500
            assert not decode.prompts
            nothing_is_left(proxy, caplog)

    run(body())


def test_a_mistake_at_a_requests_reading_is_a_500(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy:
            monkeypatch.setattr(Intake, "read", mistaken)
            assert (await ask(proxy.port, post(ROUTE, chat()))).status == 500
            nothing_is_left(proxy, caplog)

    run(body())


def test_a_mistake_in_an_ending_still_ends_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Twice: the answer cannot even be refused. The connection closes."""

    async def body() -> None:
        engine = await RawEngine(_die).start()
        async with proxy_before(engine) as proxy, Client.to(proxy.port) as client:
            monkeypatch.setattr(ClientConnection, "refuse", mistaken)
            client.send(post(ROUTE, chat()))
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await client.head()
            await wait_until(lambda: proxy.ledger.in_flight == 0)

    run(body())


def test_a_mistake_in_turning_one_away_does_not_hold_up_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        hold = engine.hold = asyncio.Event()
        routing = Routing(engine_request_limit=1, queue_seconds=0.2)
        async with proxy_before(engine, routing=routing) as proxy, Client.to(proxy.port) as first:
            first.send(post(ROUTE, chat(stream=True)))
            await first.head()
            monkeypatch.setattr(Exchange, "turn_away", mistaken)
            async with Client.to(proxy.port) as one, Client.to(proxy.port) as other:
                for client in (one, other):
                    client.send(post(ROUTE, chat()))
                for client in (one, other):
                    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                        await client.head()
            hold.set()
            assert b"".join([chunk async for chunk in first.chunks()]).endswith(b"[DONE]\n\n")

    run(body())
