"""Engines that answer their probes and fail their requests: left alone, tried again, and back when they are well."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from dynamo_proxy import breaker
from dynamo_proxy.breaker import Breaker, Circuit
from dynamo_proxy.config import EngineAddress, parse_engine_url
from dynamo_proxy.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st

from tests.proxy.proxy_fakes import (
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


def tripped() -> Breaker:
    circuit = Breaker()
    assert [circuit.failed(0.0) for _ in range(5)] == [False] * 4 + [True]
    return circuit


def test_five_failures_in_a_row_open_it_and_one_trial_closes_it() -> None:
    circuit = tripped()
    circuit.tick(breaker.FIRST_SECONDS - 0.1)
    assert circuit.blocks
    circuit.tick(breaker.FIRST_SECONDS)
    assert not circuit.blocks
    circuit.began()
    assert circuit.blocks  # one at a time
    circuit.passed()
    assert (circuit.state, circuit.score) == (Circuit.CLOSED, 0.0)


def test_a_failed_trial_opens_it_for_longer_and_a_trial_without_an_outcome_is_none() -> None:
    circuit = tripped()
    circuit.tick(5.0)
    circuit.began()
    circuit.left()
    assert circuit.state is Circuit.HALF_OPEN
    circuit.began()
    assert circuit.failed(5.0)
    assert circuit.until == 5.0 + 2 * breaker.FIRST_SECONDS


@pytest.mark.parametrize(("failures_of_ten", "opens"), [(1, False), (3, False), (5, True), (9, True)])
def test_an_engine_that_often_fails_trips_too(failures_of_ten: int, opens: bool) -> None:
    circuit = Breaker()
    for number in range(200):
        if number * failures_of_ten % 10 < failures_of_ten:
            circuit.failed(0.0)
        else:
            circuit.passed()
    assert circuit.blocks == opens


@given(st.lists(st.sampled_from(["failed", "passed", "tick", "began", "left", "reset"])))
def test_its_invariants_hold_whatever_happens(calls: list[str]) -> None:
    circuit = Breaker()
    for now, name in enumerate(calls):
        call: Any = getattr(circuit, name)
        call(float(now)) if name in ("failed", "tick") else call()
        circuit.check()


def test_an_engine_that_answers_500_is_left_alone_until_it_is_well(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dynamo_proxy")

    def told(what: str) -> int:
        return sum(what in record.getMessage() for record in caplog.records)

    async def body() -> None:
        bad, good = await FakeEngine().start(), await FakeEngine().start()
        bad.status = 500
        async with proxy_before(bad, good, router_mode="round-robin") as proxy:
            statuses = [(await ask(proxy.port, post("/v1/chat/completions", chat()))).status for _ in range(20)]
            assert (statuses, len(bad.requests)) == ([200] * 20, 5)
            assert b'dynamo_router_breaker_trips_total{engine="engine-0",reason="status_500"} 1.0' in (
                proxy.front_end.metrics()
            )
            assert (await ask(proxy.port, get("/health"))).json()["engines"][0]["state"] == "tripped"
            circuit = proxy.registry.at(0).breaker
            circuit.until = 0.0  # its time is over
            await wait_until(lambda: circuit.state is Circuit.HALF_OPEN)
            for _ in range(4):
                await ask(proxy.port, post("/v1/chat/completions", chat()))
            assert (len(bad.requests), circuit.state) == (6, Circuit.OPEN)
            assert (told("gets none for a while"), told("gets them again")) == (2, 0)
            bad.status, circuit.until = 200, 0.0
            await wait_until(lambda: circuit.state is Circuit.HALF_OPEN)
            for _ in range(4):
                assert (await ask(proxy.port, post("/v1/chat/completions", chat()))).status == 200
            assert (len(bad.requests) > 7, circuit.state) == (True, Circuit.CLOSED)
            await wait_until(lambda: told(f"{bad.url} answers its requests: it gets them again") == 1)

    run(body())


def test_a_slow_trial_opens_it_for_longer() -> None:
    circuit = Breaker()
    circuit.trip(0.0)
    circuit.tick(breaker.FIRST_SECONDS)
    circuit.began()
    circuit.trip(5.0)
    circuit.passed()  # it was answered, late
    assert circuit.until == 5.0 + 2 * breaker.FIRST_SECONDS


def test_a_tripped_engine_is_better_than_none() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        engine.status = 500
        async with proxy_before(engine) as proxy:
            for _ in range(6):
                assert (await ask(proxy.port, post("/v1/chat/completions", chat()))).status == 500
            engine.status = 200
            assert (await ask(proxy.port, post("/v1/chat/completions", chat()))).status == 200

    run(body())


def test_each_engine_may_have_its_own_deadlines() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        await reader.read()

    async def body() -> None:
        mute, good = await RawEngine(silent).start(), await RawEngine(answer_ok).start()
        async with proxy_before(good) as proxy:
            proxy.registry.at(0).draining = True
            proxy.add_engine(parse_engine_url(f"http://127.0.0.1:{mute.port},first-byte=0.1"))
            await wait_until(lambda: proxy.registry.at(1).takes_requests)
            assert (await ask(proxy.port, post("/v1/completions", {"prompt": "a"}))).status == 504
            await proxy.remove_engine(proxy.registry.at(1))
            await mute.stop()

    run(body())


def test_engine_settings_are_read_and_mistakes_are_told() -> None:
    address = parse_engine_url("http://a:8000,idle=5,connect=0.5")
    assert address == EngineAddress("a", 8000)
    assert (address.options.idle_seconds, address.options.connect_seconds) == (5.0, 0.5)
    for wrong in ("speed=3", ""):
        with pytest.raises(ConfigError, match="first-byte=SECONDS"):
            parse_engine_url(f"http://a:8000,{wrong}")
    for value in ("", "x", "0", "-1", "nan", "86401"):
        with pytest.raises(ConfigError, match=f"'{value}' is out of range for idle; give seconds from 0.01 to 86400"):
            parse_engine_url(f"http://a:8000,idle={value}")
