"""SLO classes: who waits for whom, who is turned away, and engines that would be too late."""

from __future__ import annotations

import asyncio
from random import Random

import pytest
from dynamo_proxy import policy
from dynamo_proxy.cli import main
from dynamo_proxy.config import Routing
from dynamo_proxy.slo_classes import SloClass, parse_slo_classes
from hypothesis import given

from .proxy_fakes import Answer, FakeEngine, ask, chat, post, proxy_before, run, wait_until
from .test_proxy_policy import MODEL, holdings, loads, st
from .test_proxy_waiting import ROUTE, texts

CLASSES = (SloClass("priority", 0.5, -1), SloClass("default", 5.0), SloClass("flex", 600.0, 1))


def test_the_queue_goes_by_class_and_then_by_when_a_first_token_is_due() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        routing = Routing(engine_request_limit=1, slo_classes=CLASSES, queue_seconds=60.0)
        async with proxy_before(engine, routing=routing) as server:
            room = server.front_end.waiting
            assert room is not None
            hold = engine.hold = asyncio.Event()
            first = asyncio.ensure_future(ask(server.port, post(ROUTE, chat("first", stream=True))))
            await wait_until(lambda: engine.active == 1)
            waiting: list[asyncio.Future[Answer]] = []
            for tier in ("flex", None, "unheard of", ["odd"], "default", "priority"):
                named = {} if tier is None else {"service_tier": tier}
                waiting.append(asyncio.ensure_future(ask(server.port, post(ROUTE, chat(str(tier), **named)))))
                await wait_until(lambda: len(room) == len(waiting))
            hold.set()
            assert [answer.status for answer in await asyncio.gather(first, *waiting)] == [200] * 7
            assert texts(engine) == ["first", "priority", "default", "None", "unheard of", "['odd']", "flex"]
            assert engine.prompts[1]["service_tier"] == "priority", "it passes as it came"

    run(body())


def test_a_full_queue_turns_away_whoever_would_go_last() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        routing = Routing(engine_request_limit=1, slo_classes=CLASSES, queue_size=1, queue_seconds=60.0)
        async with proxy_before(engine, routing=routing) as server:
            room = server.front_end.waiting
            assert room is not None
            hold = engine.hold = asyncio.Event()
            first = asyncio.ensure_future(ask(server.port, post(ROUTE, chat("first", stream=True))))
            await wait_until(lambda: engine.active == 1)
            patient = asyncio.ensure_future(ask(server.port, post(ROUTE, chat("flex", service_tier="flex"))))
            await wait_until(lambda: len(room) == 1)
            urgent = asyncio.ensure_future(ask(server.port, post(ROUTE, chat("priority", service_tier="priority"))))
            refused = await patient
            assert (refused.status, refused.json()["error"]["code"]) == (429, "queue_full")
            assert (await ask(server.port, post(ROUTE, chat()))).status == 429
            hold.set()
            assert [(await answer).status for answer in (first, urgent)] == [200, 200]
            assert texts(engine) == ["first", "priority"]

    run(body())


@pytest.mark.parametrize("classes", [CLASSES, ()])
def test_a_client_pushes_nobody_out_by_its_own_word(classes: tuple[SloClass, ...]) -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        routing = Routing(engine_request_limit=1, slo_classes=classes, queue_size=1, queue_seconds=60.0)
        async with proxy_before(engine, routing=routing) as server:
            room = server.front_end.waiting
            assert room is not None
            hold = engine.hold = asyncio.Event()
            first = asyncio.ensure_future(ask(server.port, post(ROUTE, chat("first", stream=True))))
            await wait_until(lambda: engine.active == 1)
            waits = asyncio.ensure_future(ask(server.port, post(ROUTE, chat("waits"))))
            await wait_until(lambda: len(room) == 1)
            assert (await ask(server.port, post(ROUTE, chat("pushes", priority=-1000)))).status == 429
            hold.set()
            assert [(await answer).status for answer in (first, waits)] == [200, 200]

    run(body())


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
