"""Fifty scale-downs under load with nothing of ours replaced: `make test-kubernetes-engines` runs this.

Real: API server and controllers, the dynamo-planner and dynamo-proxy commands, two vLLM engines on CPU, clients that
stream. The kubelet is ours. A pod is a relay before an engine: when the pod ends every connection is cut at once, as by
SIGKILL. In the first REBOOTS scale-downs the engine's process is killed as well and boots anew with the next pod; in
the others it waits behind the relay, for a boot on CPU takes a minute.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from planner_sidecar.engines.load import Load
from planner_sidecar.kubernetes.cluster import PODS, RUN, Cluster, cluster, workload
from tools.server_process import ServerProcess, free_port
from tools.tiny_model import make_model
from tools.vllm_server import VllmOptions, vllm_server

ROUNDS, REBOOTS, CLIENTS = int(os.environ.get("SCALE_DOWNS", "50")), 1, 6
BOOT_SECONDS = 1200.0
STATEFUL_SET = "/apis/apps/v1/namespaces/default/statefulsets"
BIN = Path(sys.executable).parent


@dataclass
class Container:
    """One engine and the relay that is its pod's address; `cut` counts connections that ended with the pod."""

    engine: ServerProcess
    host: str
    port: int
    server: asyncio.Server | None = None
    writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    async def begin(self) -> None:
        if self.engine.process is None:
            self.engine.start()
            await asyncio.to_thread(self.engine.wait_ready, BOOT_SECONDS)
        self.server = await asyncio.start_server(self._relay, self.host, self.port)

    async def end(self, is_killed: bool) -> None:
        """At once, whatever is on its way."""
        if self.server is None:
            return
        self.server.close()
        for writer in list(self.writers):
            writer.transport.abort()
        self.server = None
        if is_killed:
            await asyncio.to_thread(self.engine.kill)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.engine.url.removeprefix("http://").partition(":")
        with suppress(OSError):
            inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
            pair = {writer, inner_writer}
            self.writers |= pair
            await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))
            self.writers -= pair
        writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@dataclass
class Kubelet:
    """Ties pods by their ordinal to containers, and notes what was running in a pod when it ended."""

    cluster: Cluster
    containers: list[Container]
    session: aiohttp.ClientSession
    ended: list[int] = field(default_factory=list)
    reboots: int = 0

    async def round(self) -> None:
        for pod in (await self.cluster.must("GET", PODS))["items"]:
            name, meta = pod["metadata"]["name"], pod["metadata"]
            container = self.containers[int(name.rpartition("-")[2])]
            if meta.get("deletionTimestamp"):
                await self._end(container)
                await self.cluster.ask("DELETE", f"{PODS}/{name}", {"gracePeriodSeconds": 0})
            elif not pod["status"].get("podIP"):
                await container.begin()
                self.cluster.hosts[meta["uid"]] = container.host
                await self.cluster.make_ready(name, meta["uid"])

    async def _end(self, container: Container) -> None:
        if container.server is None:
            return
        self.ended.append(await running(self.session, container.engine.url))
        is_killed = self.reboots < REBOOTS
        self.reboots += is_killed
        await container.end(is_killed)

    async def run(self) -> None:
        while True:
            await self.round()
            await asyncio.sleep(0.1)


async def running(session: aiohttp.ClientSession, url: str) -> int:
    """Requests that the engine itself says it has."""
    async with session.get(url + "/metrics") as answer:
        lines = (await answer.text()).splitlines()
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(names)))


@dataclass
class Fleet:
    kubelet: Kubelet
    load: Load
    session: aiohttp.ClientSession
    admin: str
    planner: str
    log: Path

    async def until(self, true: Callable[[], Awaitable[bool]], what: str) -> None:
        end = time.monotonic() + BOOT_SECONDS
        while not await true():
            assert time.monotonic() < end, f"{what} never came"
            await asyncio.sleep(0.1)

    async def listed(self) -> dict[str, dict[str, Any]]:
        async with self.session.get(self.admin + "/engines") as answer:
            return {engine["url"]: engine for engine in (await answer.json())["engines"]}

    async def serves(self, count: int) -> bool:
        engines = await self.listed()
        return len(engines) == count and all(engine["state"] == "ready" for engine in engines.values())

    async def order(self, replicas: int) -> None:
        async def accepted() -> bool:
            async with self.session.post(self.planner + "/scale", json={"replicas": replicas}) as answer:
                return answer.status in (200, 202)

        await self.until(accepted, f"an order of {replicas}")

    def stops(self) -> int:
        lines = map(json.loads, self.log.read_text().splitlines())
        return sum(line["kind"] == "actuation" and line["what"] == "stopped" for line in lines)

    async def up_and_down(self, done: int) -> int:
        """Returns what the victim had in flight when it was chosen."""
        await self.order(2)
        await self.until(lambda: self.serves(2), "a second engine")
        victim = self.kubelet.containers[1].url

        async def busy() -> bool:
            return bool((await self.listed())[victim]["in_flight"] > 0)

        await self.until(busy, "a request on the second engine")
        await self.order(1)

        async def gone() -> bool:
            return self.stops() > done and await self.serves(1)

        had = (await self.listed()).get(victim, {}).get("in_flight", 0)
        await self.until(gone, "the end of the second engine")
        return int(had)


@asynccontextmanager
async def fleet(folder: Path) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        model, pod_port = make_model(folder / "model"), free_port()
        containers = []
        for number in range(2):
            engine = vllm_server(f"engine {number}", model, folder / f"engine-{number}.log", VllmOptions())
            stack.push_async_callback(asyncio.to_thread, engine.stop)
            containers.append(Container(engine, f"127.0.2.{10 + number}", pod_port))
            await containers[-1].begin()  # one boot after the other
            stack.push_async_callback(containers[-1].end, False)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)))
        made = await stack.enter_async_context(cluster())
        kubelet = Kubelet(made, containers, session)
        proxy, admin = _proxy(folder, containers[0].url)
        stack.push_async_callback(asyncio.to_thread, proxy.stop)
        await asyncio.to_thread(proxy.start().wait_ready)
        await containers[1].end(False)  # until its pod comes
        await containers[0].end(False)
        await made.must("POST", STATEFUL_SET, workload("StatefulSet", "engines", 1))
        stack.push_async_callback(_no_pods, made)
        watch = asyncio.create_task(kubelet.run())
        stack.callback(watch.cancel)
        planner = _planner(folder, admin, pod_port)
        stack.push_async_callback(asyncio.to_thread, planner.stop, 120)
        await asyncio.to_thread(planner.start().wait_ready)
        yield Fleet(kubelet, Load(session, proxy.url), session, admin, planner.url, folder / "decisions.jsonl")
        assert not watch.done(), watch.exception()


def _proxy(folder: Path, first: str) -> tuple[ServerProcess, str]:
    port, admin = free_port(), free_port()
    # A broken stream must show: the proxy may not mend it on another engine.
    command = [str(BIN / "dynamo-proxy"), "--port", str(port), "--admin-port", str(admin), "--engine", first]
    command += ["--router-mode", "round-robin", "--no-stream-resume", "--no-kv-events"]
    return ServerProcess("dynamo-proxy", command, f"http://127.0.0.1:{port}", folder / "proxy.log"), (
        f"http://127.0.0.1:{admin}"
    )


def _planner(folder: Path, admin: str, pod_port: int) -> ServerProcess:
    port = free_port()
    command = [
        str(BIN / "dynamo-planner"), "--no-advisory", "--proxy-admin", admin, "--port", str(port),
        "--kubernetes", "statefulset/engines", "--kubeconfig", str(RUN / "planner.kubeconfig"),
        "--kubernetes-namespace", "default", "--pod-port", str(pod_port), "--interval-seconds", "1",
        "--max-replicas", "2", "--max-waiting-per-replica", "1000", "--stabilisation-seconds", "86400",
        "--decision-log", str(folder / "decisions.jsonl"),
    ]  # fmt: skip
    return ServerProcess("dynamo-planner", command, f"http://127.0.0.1:{port}", folder / "planner.log")


async def _no_pods(made: Cluster) -> None:
    await made.ask("DELETE", f"{STATEFUL_SET}/engines", {"propagationPolicy": "Background"})
    end = time.monotonic() + 60
    while (await made.must("GET", PODS))["items"] and time.monotonic() < end:
        await made.kubelet()
        await asyncio.sleep(0.1)


@pytest.mark.timeout(3000)
def test_fifty_scale_downs_under_load_lose_no_request(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    async def story() -> None:
        async with fleet(tmp_path) as here:
            await here.until(lambda: here.serves(1), "the first engine")
            clients = [asyncio.create_task(here.load.client(number)) for number in range(CLIENTS)]
            had = [await here.up_and_down(done) for done in range(ROUNDS)]
            here.load.is_over = True
            await asyncio.gather(*clients)
            said = (
                f"{len(had)} scale-downs, {sum(had)} requests in flight on the victims after the order, "
                f"{here.load.whole} answers whole, {len(here.load.bad)} not, {here.kubelet.reboots} engines rebooted"
            )
            record_property("scale_downs", said)
            sys.stdout.write(said + "\n")
            assert here.load.bad == []
            assert here.kubelet.ended == [0] * ROUNDS, "a pod ended with requests running in its engine"
            assert here.load.whole > ROUNDS

    asyncio.run(story())
