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
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from dynamo_planner.control import ControlPort
from prometheus_client.parser import text_string_to_metric_families

from tests.planner.planner_fakes import FakeEngine, FakeProxy, bench, served, vllm_text
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
