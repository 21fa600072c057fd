"""A real HPA on what an advisory planner wants: `make test-kubernetes` runs this with pytest.

API server, HPA controller, Deployment controller and the planner are real. In the place of prometheus-adapter stands
one object of the group external.metrics.k8s.io into which the test writes what Prometheus' parser reads from the
planner's /metrics: adapters need a network of services, which is not here. The HPA is that of autoscaling.yaml.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web
from dynamo_planner.control import ControlPort
from prometheus_client.parser import text_string_to_metric_families

from planner_sidecar.kubernetes.cluster import Cluster, cluster, workload
from tests.planner.planner_fakes import Bench, FakeEngine, FakeProxy, bench, served, vllm_text
from tests.planner.test_planner_service import ask

DEPLOYMENT = "/apis/apps/v1/namespaces/default/deployments"
HPAS = "/apis/autoscaling/v2beta2/namespaces/default/horizontalpodautoscalers"
PLURAL = "dynamo-planner-desired-replicas"  # of a stored object: no underscores
METRICS = f"/apis/external.metrics.k8s.io/v1beta1/namespaces/default/{PLURAL}"
STORED = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {
        "name": f"{PLURAL}.external.metrics.k8s.io",
        "annotations": {"api-approved.kubernetes.io": "unapproved, stands in for an adapter"},
    },
    "spec": {
        "group": "external.metrics.k8s.io",
        "scope": "Namespaced",
        "names": {
            "kind": "ExternalMetricValue",
            "listKind": "ExternalMetricValueList",
            "plural": PLURAL,
            "singular": "desired",
        },
        "versions": [
            {
                "name": "v1beta1",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}


async def publish(made: Cluster, stand: Bench, base: str) -> None:
    """What an adapter does: from the planner's page into the API. What has no sample any more is not there."""
    page = (await ask(stand, "GET", f"{base}/metrics"))[1]
    samples = [
        sample
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "dynamo_planner_desired_replicas"
    ]
    if not samples:
        await made.ask("DELETE", f"{METRICS}/now")
        return
    (sample,) = samples
    body = {
        "apiVersion": "external.metrics.k8s.io/v1beta1",
        "kind": "ExternalMetricValue",
        "metadata": {"name": "now", "labels": sample.labels},
        "metricName": PLURAL,
        "metricLabels": sample.labels,
        "timestamp": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "value": str(int(sample.value)),
    }
    status, _ = await made.ask("PATCH", f"{METRICS}/now", body, "application/merge-patch+json")
    if status == 404:
        await made.must("POST", METRICS, body)


def old_hpa() -> dict[str, Any]:
    """The manifest's HPA as API server 1.20 knows it."""
    manifest = Path(__file__).parent / "autoscaling.yaml"
    hpa = next(
        document
        for document in yaml.safe_load_all(manifest.read_text())
        if document["kind"] == "HorizontalPodAutoscaler"
    )
    hpa["apiVersion"] = "autoscaling/v2beta2"
    hpa["spec"]["metrics"][0]["external"]["metric"]["name"] = PLURAL
    return dict(hpa)


@dataclass
class Pods:
    """Every ready pod is an engine that the proxy lists; they share `load` requests, eight at a time each."""

    engine: FakeEngine
    load: float = 0.4
    turns: int = 0
    state: str = "ready"

    def share(self, there: int) -> None:
        self.turns += 1
        each = self.load / max(1, there)
        running = min(8.0, each)
        self.engine.text = vllm_text(running, each - running, 0.09 * running, scale=self.turns)


def test_a_real_hpa_follows_the_planner_up_and_down(tmp_path: Path) -> None:
    async def story() -> None:
        pods, proxy = Pods(FakeEngine()), FakeProxy()
        async with AsyncExitStack() as stack:
            made = await stack.enter_async_context(cluster())
            port = await stack.enter_async_context(everywhere(pods.engine))
            admin = await stack.enter_async_context(served(proxy.app()))
            stand = await stack.enter_async_context(bench(tmp_path, proxy_admin=admin, down_period_seconds=1))
            await made.ask("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", STORED)
            await made.must("POST", DEPLOYMENT, workload("Deployment", "vllm", 1))
            await made.must("POST", HPAS, old_hpa())
            control = ControlPort(stand.fleet, 60.0, time.monotonic)
            base = f"http://127.0.0.1:{await control.start('127.0.0.1', 0)}"

            async def turn() -> int:
                await made.kubelet()
                there = await made.replicas(f"{DEPLOYMENT}/vllm")
                pods.share(there)
                proxy.states = {f"http://127.0.3.{number}:{port}": pods.state for number in range(1, there + 1)}
                await stand.planner.tick()
                await publish(made, stand, base)
                await asyncio.sleep(0.2)
                return there

            async def until(count: int) -> None:
                end = time.monotonic() + 180
                while await turn() != count:
                    assert time.monotonic() < end, (stand.said[-3:], await made.must("GET", f"{HPAS}/vllm"))

            async def blind(count: int) -> None:
                """The HPA has looked, has found no metric, and holds."""
                end, looks = time.monotonic() + 180, 0
                while looks < 10:
                    assert time.monotonic() < end, await made.must("GET", f"{HPAS}/vllm")
                    assert await turn() == count
                    looks += "FailedGetExternalMetric" in str(await made.must("GET", f"{HPAS}/vllm"))

            try:
                await until(1)
                pods.load = 26.0
                await until(4)
                pods.state = "down"  # the network between the proxy and the engines is cut
                await blind(4)
                pods.state = "ready"
                await until(4)
                pods.load = 0.4
                await until(1)
            finally:
                await control.close()
                await made.ask("DELETE", f"{HPAS}/vllm")
                await made.ask("DELETE", f"{DEPLOYMENT}/vllm")

    asyncio.run(story())


@asynccontextmanager
async def everywhere(engine: FakeEngine) -> AsyncIterator[int]:
    """One engine on every address of this machine; its port."""
    runner = web.AppRunner(engine.app(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", 0).start()
    try:
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()
