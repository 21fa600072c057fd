"""An engine that is far slower than the others is left alone for a while; a slow fleet, or a small excess, is not."""

from __future__ import annotations

import asyncio

import orjson
import pytest
from aiohttp import web
from dynamo_proxy.breaker import FIRST_SECONDS, Breaker
from dynamo_proxy.speeds import Speeds

from tests.proxy.proxy_fakes import FakeEngine, ask, chat, get, post, proxy_before, run


def seen(speeds: Speeds, slot: int, times: float, predicted: float = 0.1, count: int = 10) -> list[bool]:
    found = [speeds.observe(slot, predicted, times * predicted) for _ in range(count)]
    speeds.check()
    return found


def test_an_outlier_is_told_once_and_then_judged_anew() -> None:
    speeds = Speeds()
    for slot in (0, 1, 2):
        assert not any(seen(speeds, slot, 1.0))
    assert seen(speeds, 3, 20.0, count=10) == [False] * 9 + [True]
    assert not any(seen(speeds, 3, 20.0, count=9))
    speeds.forget(3)
    assert not any(seen(speeds, 3, 1.0, count=30))


def test_slow_together_a_little_slow_and_alone_are_no_outliers() -> None:
    together = Speeds()
    assert not any(any(seen(together, slot, 20.0)) for slot in range(4))
    little = Speeds()
    assert not any(any(seen(little, slot, 1.0)) for slot in range(3))
    assert not any(seen(little, 3, 3.0, count=50))
    assert not any(seen(little, 4, 8.0, predicted=0.02, count=50))  # 0.14 s late: noise
    pair = Speeds()
    assert not any(seen(pair, 0, 1.0))
    assert not any(seen(pair, 1, 20.0, count=50))  # who is to say which of two is the slow one


def test_a_tripped_breaker_opens_again_by_a_trial_only() -> None:
    circuit = Breaker()
    circuit.trip(10.0)
    circuit.passed()  # an answer that began before
    assert circuit.blocks
    circuit.tick(10.0 + FIRST_SECONDS)
    assert not circuit.blocks
    circuit.began()
    circuit.passed()
    circuit.check()
    assert (circuit.blocks, circuit.score) == (False, 0.0)


class LateEngine(FakeEngine):
    delay_seconds = 0.0

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if orjson.loads(await request.read()).get("stream"):
            await asyncio.sleep(self.delay_seconds)
        return await super()._answer(request)


def test_requests_keep_off_an_engine_that_became_slow(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        engines = [LateEngine() for _ in range(4)]
        for engine in engines:
            await engine.start()
        engines[2].delay_seconds = 2.0
        async with proxy_before(*engines, router_mode="round-robin") as proxy:
            slow = proxy.registry.find(engines[2].address)
            for _ in range(20):
                await asyncio.gather(
                    *(ask(proxy.port, post("/v1/chat/completions", chat(stream=True))) for _ in range(44))
                )
                if slow.breaker.blocks:
                    break
            assert slow.state == "tripped"
            before = len(engines[2].requests)
            for _ in range(8):
                assert (await ask(proxy.port, post("/v1/chat/completions", chat()))).status == 200
            for _ in range(3):
                proxy.monitor.engine_is_slow(slow)
            said = [record for record in caplog.records if "far slower" in record.getMessage()]
            assert len(said) == 1, "once, however often it trips"
            page = (await ask(proxy.port, get("/metrics"))).body
            assert b'dynamo_router_breaker_trips_total{engine="engine-2",reason="slow"} 4.0' in page
            assert len(engines[2].requests) - before <= 1  # a trial, if this took its time

    run(body())
