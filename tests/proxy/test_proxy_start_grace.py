"""Engines that never answer: they count as starting for a while, then as down, and no client's typo waits for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from dynamo_proxy.server import ProxyServer

from tests.proxy.proxy_fakes import QUICK, Answer, FakeEngine, ask, chat, get, post, proxy_before, run, wait_until
from tests.proxy.test_proxy_admin import admin

GRACE_SECONDS = 120.0


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def dead() -> FakeEngine:
    """An engine at whose address nobody listens until it is started again."""
    engine = await FakeEngine(("other",)).start()
    await engine.stop()
    return engine


async def asked(proxy: ProxyServer, model: str) -> Answer:
    return await ask(proxy.port, post("/v1/chat/completions", {**chat(), "model": model}))


async def states(proxy: ProxyServer) -> list[str]:
    """As both listeners tell them."""
    told = (await ask(proxy.port, get("/health"))).json()["engines"]
    listed = (await admin(proxy.admin_port, "GET", "/engines")).json()["engines"]
    assert [row["state"] for row in told] == [row["state"] for row in listed]
    return [row["state"] for row in listed]


def probes(proxy: ProxyServer) -> float:
    counter: Any = proxy.metrics.probes.labels("engine-0", "connect_failed")
    return float(counter._value.get())


async def two_more_probes(proxy: ProxyServer) -> None:
    """The second of them began after this call, so it saw the clock as it is now."""
    before = probes(proxy)
    await wait_until(lambda: probes(proxy) >= before + 2, "two more probes")


def test_an_unknown_model_is_503_while_an_engine_starts_and_404_when_it_never_came() -> None:
    async def body() -> None:
        lost, alive, clock = await dead(), await FakeEngine().start(), Clock()
        async with proxy_before(lost, alive, ready=False, clock=clock) as proxy:
            await wait_until(lambda: proxy.registry.at(1).takes_requests)
            await two_more_probes(proxy)
            clock.now += GRACE_SECONDS - 1
            await two_more_probes(proxy)
            assert await states(proxy) == ["starting", "ready"]
            early = await asked(proxy, "other")
            assert (early.status, early.headers["retry-after"]) == (503, "2")
            error = early.json()["error"]
            assert error["code"] == "no_engine_ready"
            assert "no ready engine serves the model `other`, but an engine that has not told" in error["message"]
            clock.now += 1
            await wait_until(lambda: proxy.registry.at(0).state == "down", "the grace is over")
            assert await states(proxy) == ["down", "ready"]
            late = await asked(proxy, "other")
            assert (late.status, late.json()["error"]["code"]) == (404, "model_not_found")
            assert "retry-after" not in late.headers
            assert (await asked(proxy, "tiny")).status == 200
            await lost.start(lost.port)
            await wait_until(lambda: proxy.registry.at(0).takes_requests, "it came after all")
            assert await states(proxy) == ["ready", "ready"]
            assert (await asked(proxy, "other")).headers["x-dynamo-engine"] == "engine-0"
            assert (await asked(proxy, "neither")).status == 404

    run(body())


def test_a_model_of_an_engine_that_was_there_stays_503_however_long_it_is_down() -> None:
    async def body() -> None:
        engines, clock = [await FakeEngine(("other",)).start(), await FakeEngine().start()], Clock()
        async with proxy_before(*engines, clock=clock) as proxy:
            await engines[0].stop()
            await wait_until(lambda: proxy.registry.at(0).state == "down")
            clock.now += 10 * GRACE_SECONDS
            await two_more_probes(proxy)
            answer = await asked(proxy, "other")
            assert (answer.status, answer.json()["error"]["code"]) == (503, "no_engine_ready")
            assert "no engine that serves the model `other` takes requests now" in answer.json()["error"]["message"]
            assert (await asked(proxy, "neither")).status == 404
            listed = (await admin(proxy.admin_port, "GET", "/engines")).json()["engines"]
            assert [row["was_ready"] for row in listed] == [True, True]

    run(body())


@pytest.mark.parametrize("grace", [0.0, GRACE_SECONDS])
def test_without_any_ready_engine_every_model_is_503(grace: float) -> None:
    async def body() -> None:
        clock, timeouts = Clock(), replace(QUICK, start_grace_seconds=grace)
        async with proxy_before(await dead(), ready=False, clock=clock, timeouts=timeouts) as proxy:
            await wait_until(lambda: probes(proxy) > 0)
            assert await states(proxy) == ["down" if grace == 0 else "starting"]
            answer = await asked(proxy, "tiny")
            assert answer.status == 503
            assert "no engine is ready" in answer.json()["error"]["message"]
            assert "told its models" not in answer.json()["error"]["message"]

    run(body())
