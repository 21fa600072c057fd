"""SLO classes: who waits for whom, who is turned away, and engines that would be too late."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from dynamo_proxy import policy
from dynamo_proxy.cli import main
from dynamo_proxy.config import Routing
from dynamo_proxy.server import ProxyServer
from dynamo_proxy.slo_classes import SloClass, parse_slo_classes
from hypothesis import given

from .proxy_fakes import Answer, Client, FakeEngine, ask, chat, post, proxy_before, run, wait_until
from .test_proxy_cli import ENGINE, call
from .test_proxy_guard import hashed, key_file
from .test_proxy_policy import MODEL, holdings, loads, st
from .test_proxy_waiting import ROUTE, texts

CLASSES = (SloClass("priority", 0.5, -1), SloClass("default", 5.0), SloClass("flex", 600.0, 1))


class Busy:
    """An engine that is at work on "first" until it is let go, and a proxy that gives it one request at a time."""

    def __init__(self, server: ProxyServer, engine: FakeEngine, headers: Sequence[str] = ()) -> None:
        self.server, self.engine, self.headers = server, engine, headers
        self.first = self.ask("first", stream=True)

    def ask(self, text: str, *headers: str, **fields: Any) -> asyncio.Future[Answer]:
        request = post(ROUTE, chat(text, **fields), *(headers or self.headers))
        return asyncio.ensure_future(ask(self.server.port, request))

    async def wait(self, text: str, **fields: Any) -> asyncio.Future[Answer]:
        """Ask, and come back when this request waits."""
        assert self.server.front_end.waiting is not None
        before = len(self.server.front_end.waiting)
        asked = self.ask(text, **fields)
        await wait_until(lambda: len(self.server.front_end.waiting or ()) > before)
        return asked

    def counted(self, slo_class: str, outcome: str) -> float:
        found = self.server.metrics.slo.labels(slo_class, outcome)
        return float(found._value.get())

    def let_go(self) -> None:
        assert self.engine.hold is not None
        self.engine.hold.set()


@contextlib.asynccontextmanager
async def busy(
    queue_size: int, classes: tuple[SloClass, ...] = CLASSES, headers: Sequence[str] = (), **settings: Any
) -> AsyncIterator[Busy]:
    engine = await FakeEngine().start()
    routing = Routing(engine_request_limit=1, slo_classes=classes, queue_size=queue_size, queue_seconds=60.0)
    async with proxy_before(engine, routing=routing, **settings) as server:
        engine.hold = asyncio.Event()
        started = Busy(server, engine, headers)
        await wait_until(lambda: engine.active == 1)
        yield started


def test_the_queue_goes_by_class_and_then_by_when_a_first_token_is_due() -> None:
    async def body() -> None:
        async with busy(1024) as at:
            waiting = []
            for tier in ("flex", None, "unheard of", ["odd"], "default", "priority"):
                waiting.append(await at.wait(str(tier), **({} if tier is None else {"service_tier": tier})))
            at.let_go()
            assert [answer.status for answer in await asyncio.gather(at.first, *waiting)] == [200] * 7
            assert texts(at.engine) == ["first", "priority", "default", "None", "unheard of", "['odd']", "flex"]
            assert at.engine.prompts[1]["service_tier"] == "priority", "it passes as it came"

    run(body())


def test_a_full_queue_turns_away_whoever_would_go_last() -> None:
    async def body() -> None:
        async with busy(1) as at:
            patient = await at.wait("flex", service_tier="flex", stream=True)
            urgent = at.ask("priority", service_tier="priority")
            refused = await patient
            assert (refused.status, refused.json()["error"]["code"]) == (429, "queue_full")
            assert (await at.ask("hi")).status == 429
            assert at.counted("flex", "refused") == 1
            at.let_go()
            assert [(await answer).status for answer in (at.first, urgent)] == [200, 200]
            assert texts(at.engine) == ["first", "priority"]

    run(body())


@pytest.mark.parametrize("classes", [CLASSES, ()])
def test_a_client_pushes_nobody_out_by_its_own_word(classes: tuple[SloClass, ...]) -> None:
    async def body() -> None:
        async with busy(1, classes) as at:
            waits = await at.wait("waits")
            assert (await at.ask("pushes", priority=-1000)).status == 429
            at.let_go()
            assert [(await answer).status for answer in (at.first, waits)] == [200, 200]

    run(body())


def test_streams_of_a_class_that_get_no_first_token_are_counted(tmp_path: Path) -> None:
    async def body() -> None:
        keys = key_file(tmp_path, f"alice {hashed('a')} requests-per-minute=3", f"bob {hashed('b')}")
        async with busy(2, headers=["x-api-key: b"], api_keys_path=keys) as at:
            async with Client.to(at.server.port) as client:
                asked = chat("leaves", service_tier="priority", stream=True)
                client.send(post(ROUTE, asked, "x-api-key: a"))
                await wait_until(lambda: len(at.server.front_end.waiting or ()) == 1)
            await wait_until(lambda: at.counted("priority", "left") == 1)
            assert (await at.ask("wrong", "x-api-key: a", service_tier="flex", stream=True, model="none")).status == 404
            await at.wait("whole", service_tier="flex")
            over = [at.ask("over", "x-api-key: a", service_tier="flex", stream=True) for _ in range(3)]
            await wait_until(lambda: at.counted("flex", "refused") == 2)
            at.engine.status = 500
            at.let_go()
            assert sorted([(await answer).status for answer in over]) == [429, 429, 500]
            assert (at.counted("flex", "refused"), at.counted("priority", "refused")) == (3, 0)
            await at.first

    run(body())


def test_a_key_may_name_the_classes_of_its_line(tmp_path: Path) -> None:
    async def body() -> None:
        lines = (
            f"any {hashed('a')}",
            f"some {hashed('s')} slo-classes=flex,default",
            f"none {hashed('n')} slo-classes=",
        )
        async with busy(9, headers=["x-api-key: a"], api_keys_path=key_file(tmp_path, *lines)) as at:
            for key, tier in (("s", "priority"), ("n", "flex")):
                refused = await at.ask("hi", f"x-api-key: {key}", service_tier=tier, stream=True)
                error = refused.json()["error"]
                assert (refused.status, error["code"]) == (400, "service_tier_not_allowed")
                assert tier in error["message"]
            allowed = [at.ask("hi", f"x-api-key: {key}", service_tier=tier)
                       for key, tier in (("a", "priority"), ("s", "flex"), ("n", "auto"))]  # fmt: skip
            at.let_go()
            assert [(await answer).status for answer in (at.first, *allowed)] == [200] * 4
            assert len(at.engine.requests) == 4

    run(body())


def test_a_class_that_is_none_is_told_with_its_line(tmp_path: Path) -> None:
    path = key_file(tmp_path, f"alice {hashed('a')} slo-classes=fast")
    code, said = call(*ENGINE, "--api-keys-file", path, "--slo-class", "flex,ttft=1")
    assert code == 2
    assert "line 2: there is no SLO class 'fast'; --slo-class fast,ttft=... makes it" in said


def test_an_urgent_prompt_leaves_its_prefix_for_an_engine_that_is_in_time() -> None:
    async def body() -> None:
        engines = [await FakeEngine().start() for _ in range(2)]
        async with proxy_before(*engines, routing=Routing(slo_classes=CLASSES)) as server:
            asked = {"model": "tiny", "prompt": list(range(10_000)), "stream": True}
            where = [(await ask(server.port, post("/v1/completions", asked))).headers["x-dynamo-engine"] for _ in "123"]
            assert len(set(where)) == 1, "its prefix is there"
            home = next(engine for engine in server.registry if engine.name == where[0])
            # Longer than computing the prompt elsewhere, shorter than that and what it does to others.
            queued = server.ledger.charge(home.slot, 12_000, 12_000)
            stays, leaves = [
                (await ask(server.port, post("/v1/completions", {**asked, "service_tier": tier})))
                for tier in ("flex", "priority")
            ]
            server.ledger.release(queued)
            assert stays.headers["x-dynamo-engine"] == home.name
            assert leaves.headers["x-dynamo-engine"] != home.name
            page = server.front_end.metrics().decode()
            assert 'dynamo_router_slo_streams_total{outcome="in_time",slo_class="flex"} 1.0' in page
            assert 'dynamo_router_slo_streams_total{outcome="in_time",slo_class="priority"} 1.0' in page

    run(body())


@given(loads, st.integers(0, 50_000), st.floats(0.01, 100.0), st.data())
def test_only_engines_that_are_in_time_are_left_or_the_soonest(
    fleet: list[policy.Load], tokens: int, ttft: float, data: st.DataObject
) -> None:
    held = holdings(fleet, data)
    left = policy.in_time(fleet, held, tokens, MODEL, ttft)
    patient = policy.in_time(fleet, held, tokens, MODEL, 1e9)
    assert list(patient) == fleet
    assert left
    assert all(load in fleet for load in left)
    (soonest,) = policy.in_time(fleet, held, tokens, MODEL, 0.0)
    assert len(left) > 1 or left[0] is soonest or policy.in_time([soonest], held, tokens, MODEL, ttft) == left
    assert policy.choose_kv(left, held, tokens, MODEL, Random(1)).slot in {load.slot for load in fleet}


@pytest.mark.parametrize(
    "text",
    ["", "flex", "flex,ttft=", "flex,ttft=0", "flex,ttft=x", "flex,ttft=1,tpot=3", ",ttft=1", "a,ttft=1,priority=x"],
)
def test_a_class_that_is_none_ends_the_start(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--engine", "http://127.0.0.1:9", "--slo-class", text]) == 2
    assert "NAME,ttft=SECONDS[,priority=N]" in capsys.readouterr().err


def test_classes_as_they_are_written() -> None:
    read = parse_slo_classes(["priority,ttft=0.5,priority=-1", "default,ttft=5", "flex,ttft=600,priority=1"])
    assert tuple(read.values()) == CLASSES
