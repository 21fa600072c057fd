"""What KEDA and an HPA read from an advisory planner, as kubernetes/autoscaling.yaml tells them to, and the drain that
a pod does by itself there. `make test-kubernetes` runs a real HPA on it.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from dynamo_planner.control import ControlPort
from dynamo_planner.decision import decide, is_blind
from dynamo_planner.records import (
    Decision,
    DecisionInputs,
    EngineObservation,
    FleetObservation,
    Memory,
    ProxyObservation,
    SizingPolicy,
)
from prometheus_client.parser import text_string_to_metric_families

from tests.planner.planner_fakes import Bench, FakeEngine, FakeProxy, bench, served, vllm_text
from tests.planner.test_planner_service import ask

MANIFEST = Path(__file__).parents[2] / "planner_sidecar" / "kubernetes" / "autoscaling.yaml"


def documents() -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(MANIFEST.read_text())}


def test_keda_and_prometheus_read_the_same_number(tmp_path: Path) -> None:
    """By the path and the field of the ScaledObject, and by the name and labels of the HPA's metric."""
    keda = documents()["ScaledObject"]["spec"]["triggers"][0]["metadata"]
    asked = documents()["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["external"]
    where = urlsplit(keda["url"])
    assert keda["targetValue"] == asked["target"]["averageValue"] == "1"

    async def story() -> None:
        engine = FakeEngine(vllm_text(running=8, waiting=40, kv=0.9))
        async with served(engine.app()) as url, bench(tmp_path, engine=(url,)) as stand:
            ahead = [0.0]
            port = ControlPort(stand.fleet, 60.0, lambda: time.monotonic() + ahead[0])
            base = f"http://127.0.0.1:{await port.start('127.0.0.1', 0)}"
            try:
                assert (await ask(stand, "GET", f"{base}{where.path}?{where.query}"))[0] == 503
                decision, _ = await stand.planner.tick()
                assert decision.desired > 1
                status, text = await ask(stand, "GET", f"{base}{where.path}?{where.query}")
                assert (status, json.loads(text)[keda["valueLocation"]]) == (200, decision.desired)
                page = (await ask(stand, "GET", f"{base}/metrics"))[1]
                metric = asked["metric"]
                seen = [
                    sample.value
                    for family in text_string_to_metric_families(page)
                    for sample in family.samples
                    if sample.name == metric["name"]
                    and metric["selector"]["matchLabels"].items() <= sample.labels.items()
                ]
                assert seen == [decision.desired]
                assert (await ask(stand, "GET", f"{base}/desired?pool=none"))[0] == 404
                ahead[0] = 100.0
                assert (await ask(stand, "GET", f"{base}/desired"))[0] == 503, "too old to act on"
            finally:
                await port.close()

    asyncio.run(story())


def test_advice_to_shrink_stays_until_somebody_follows_it(tmp_path: Path) -> None:
    """An autoscaler looks when it likes: advice that came and went would be missed."""

    async def story() -> None:
        engines = [FakeEngine(vllm_text(running=0, kv=0.1)) for _ in range(3)]
        async with served(engines[0].app()) as a, served(engines[1].app()) as b, served(engines[2].app()) as c:
            proxy = FakeProxy(dict.fromkeys((a, b, c), "ready"))
            async with served(proxy.app()) as admin, bench(tmp_path, proxy_admin=admin) as stand:
                advised = [(await stand.planner.tick())[0].desired for _ in range(4)]
                assert advised[0] < 3
                assert set(advised) == {advised[0]}
                del proxy.states[c]
                followed = (await stand.planner.tick())[0]
                assert (followed.current, followed.desired, followed.reason) == (2, 2, "rate_limited")

    asyncio.run(story())


def test_what_the_proxy_lists_belongs_to_the_pool_of_its_role(tmp_path: Path) -> None:
    """An engine that an autoscaler starts is named by nobody; one without a role is no pool's."""

    async def story() -> None:
        engines = [FakeEngine() for _ in range(4)]
        async with AsyncExitStack() as stack:
            urls = [await stack.enter_async_context(served(engine.app())) for engine in engines]
            roles = dict(zip(urls, ("prefill", "decode", "decode", ""), strict=True))
            proxy = FakeProxy(dict.fromkeys(urls, "ready"), roles=roles)
            admin = await stack.enter_async_context(served(proxy.app()))
            pools = {"p": {"role": "prefill"}, "d": {"role": "decode"}, "other": {"engine": [urls[3]]}}
            stand = await stack.enter_async_context(bench(tmp_path, proxy_admin=admin, pools=pools))
            done = await stand.fleet.tick()
            assert {name: decision.current for name, (decision, _) in done.items()} == {"p": 1, "d": 2, "other": 1}

    asyncio.run(story())


@asynccontextmanager
async def advised(stand: Bench) -> AsyncIterator[Any]:
    """Asks what an autoscaler is told after one more tick: the number, by both ways, or None."""
    port = ControlPort(stand.fleet, 60.0, time.monotonic)
    base = f"http://127.0.0.1:{await port.start('127.0.0.1', 0)}"

    async def told() -> int | None:
        await stand.planner.tick()
        status, text = await ask(stand, "GET", f"{base}/desired")
        page = (await ask(stand, "GET", f"{base}/metrics"))[1]
        samples = [line for line in page.splitlines() if line.startswith("dynamo_planner_desired_replicas{")]
        if status == 503:
            assert samples == []
            assert "keep what there is" in text
            return None
        (sample,) = samples
        assert float(sample.rpartition(" ")[2]) == json.loads(text)["desired_replicas"]
        return int(json.loads(text)["desired_replicas"])

    try:
        yield told
    finally:
        await port.close()


def test_a_planner_that_has_never_reached_its_proxy_advises_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, proxy_admin="http://127.0.0.1:9") as stand, advised(stand) as told:
            assert await told() is None

    asyncio.run(story())


def test_there_is_no_advice_while_nothing_of_the_pool_can_be_seen(tmp_path: Path) -> None:
    """The engines run all the while: one number less, and an HPA with a window of 0 would take them at once."""

    async def story() -> None:
        engine = FakeEngine(vllm_text(running=8, kv=0.75))
        async with AsyncExitStack() as stack:
            urls = [await stack.enter_async_context(served(engine.app())) for _ in range(4)]
            proxy = FakeProxy(dict.fromkeys(urls, "ready"))
            admin = await stack.enter_async_context(served(proxy.app()))
            stand = await stack.enter_async_context(bench(tmp_path, proxy_admin=admin))
            told = await stack.enter_async_context(advised(stand))
            assert await told() == 4
            for state in ("down", "starting", "draining"):
                proxy.states = dict.fromkeys(urls, state)
                assert await told() is None, state
                proxy.states = dict.fromkeys(urls, "ready")
                assert await told() == 4
            proxy.states = {}
            assert await told() is None
            proxy.states = dict.fromkeys(urls, "ready")
            engine.mood = "error"
            assert await told() is None
            engine.mood = "ok"
            assert await told() == 4
            proxy.broken = {"list"}
            assert await told() is None
            proxy.broken = set()
            assert await told() == 4

    asyncio.run(story())


POLICY = SizingPolicy(max_replicas=16, stabilisation_seconds=100.0)
SLEEPY = replace(POLICY, idle_to_zero_seconds=200.0)
QUIET = ProxyObservation(interval_seconds=10, arrivals=0, prompt_tokens=0)
ASKED = replace(QUIET, arrivals=5)


def seen(now: float, state: str, count: int, proxy: ProxyObservation, running: float = 0.0) -> FleetObservation:
    one = EngineObservation("", state, running=running, waiting=0, kv_usage=0.07 * running, interval_seconds=10)
    return FleetObservation(now, tuple(replace(one, url=f"http://e{number}") for number in range(count)), proxy)


def after_work(policy: SizingPolicy) -> Memory:
    """Twelve that are needed."""
    memory = Memory()
    for tick in range(20):
        decision = decide(DecisionInputs(seen(10.0 * tick, "ready", 12, ASKED, running=10.0), policy, memory))
        memory = decision.memory
    assert decision.desired == 12
    return memory


def in_turn(policy: SizingPolicy, memory: Memory, *fleets: FleetObservation) -> list[Decision]:
    decisions = []
    for fleet in fleets:
        decisions.append(decide(DecisionInputs(fleet, policy, memory)))
        memory = decisions[-1].memory
    return decisions


def test_a_fleet_that_went_down_is_replaced_as_the_window_needed_it_and_not_by_the_minimum() -> None:
    """However long it is down: nothing was seen since."""
    memory = after_work(POLICY)
    down = in_turn(POLICY, memory, *(seen(200.0 + 10 * tick, "down", 12, ASKED) for tick in range(30)))
    needed = max(count for _, count in memory.needs)  # with the margin of a scale-down
    assert {(decision.desired, decision.reason) for decision in down} == {(needed, "below_min")}
    assert needed >= 12
    assert all(map(is_blind, down))
    assert in_turn(SLEEPY, after_work(SLEEPY), seen(200.0, "down", 12, ASKED))[0].desired == needed, "not even to wake"


def test_a_pool_sleeps_on_advice_when_it_was_idle_and_not_when_it_is_lost_from_sight() -> None:
    memory = after_work(SLEEPY)
    cut = in_turn(SLEEPY, memory, *(seen(200.0 + 10 * tick, "down", 12, QUIET) for tick in range(19)))
    assert {decision.reason for decision in cut} == {"asleep"}
    assert all(map(is_blind, cut))
    idle = in_turn(SLEEPY, memory, *(seen(200.0 + 10 * tick, "ready", 12, QUIET) for tick in range(20)))
    assert (idle[-1].desired, idle[-1].reason, is_blind(idle[-1])) == (0, "idle_to_zero", False)
    gone = in_turn(SLEEPY, idle[-1].memory, *(seen(400.0 + 10 * tick, "down", 12, QUIET) for tick in range(20)))
    assert {(decision.desired, is_blind(decision)) for decision in gone} == {(0, False)}
    (woken,) = in_turn(SLEEPY, gone[-1].memory, seen(600.0, "down", 12, ASKED))
    assert (woken.desired, woken.reason, is_blind(woken)) == (1, "wake", False)


def hook(url: str, admin: str) -> subprocess.Popen[str]:
    """The preStop program of the manifest, in its pod."""
    host, _, port = url.removeprefix("http://").partition(":")
    env = {"POD_IP": host, "ENGINE_PORT": port, "PROXY_ADMIN": admin}
    program = documents()["ConfigMap"]["data"]["drain.py"]
    return subprocess.Popen(
        [sys.executable, "-I", "-c", program], env=os.environ | env, stderr=subprocess.PIPE, text=True
    )


def test_a_pod_that_an_autoscaler_ends_drains_itself(tmp_path: Path) -> None:
    url = "http://10.0.0.7:8000"

    async def story() -> None:
        proxy = FakeProxy({url: "ready"}, {url: 2}, broken={"drain"})
        async with served(proxy.app()) as admin:
            running = hook(url, admin)
            try:
                await until(lambda: proxy.calls.count("drain") > 1, running)
                proxy.broken.clear()  # it was restarting
                await until(lambda: proxy.states[url] == "draining", running)
                calls = len(proxy.calls)
                await until(lambda: len(proxy.calls) > calls + 3, running)  # it waits
                proxy.in_flight[url] = 0
                await ended(running)
                await ended(hook("http://10.0.0.8:8000", admin))  # unknown there: nothing to wait for
            finally:
                running.kill()

    asyncio.run(story())


async def until(true: Any, running: subprocess.Popen[str]) -> None:
    while not true():
        assert running.poll() is None, running.communicate()
        await asyncio.sleep(0.02)


async def ended(running: subprocess.Popen[str]) -> None:
    _, said = await asyncio.to_thread(running.communicate, None, 60)
    assert (running.returncode, said) == (0, "")
