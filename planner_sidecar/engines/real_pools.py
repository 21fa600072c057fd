"""dynamo-planner and dynamo-proxy over local vLLM engines, nothing replaced: `make test-planner-engines` runs this.

A pool that sleeps is woken by a request, and a prefill and a decode pool are sized apart: one of them goes up and down
under load and nothing is lost. CPU engines take a minute or more to boot, so this is not part of the suite.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from planner_sidecar.engines.load import Load
from tools.server_process import ServerProcess, free_port
from tools.tiny_model import make_model
from tools.vllm_server import MODEL_NAME, VllmOptions, vllm_server

BIN = Path(sys.executable).parent
BOOT_SECONDS = 900.0


@dataclass
class Stand:
    """The two commands, and what they say of themselves."""

    session: aiohttp.ClientSession
    proxy: str
    admin: str
    planner: str
    log: Path

    async def until(self, true: Callable[[], Awaitable[bool]], what: str) -> None:
        end = time.monotonic() + BOOT_SECONDS
        while not await true():
            assert time.monotonic() < end, f"{what} never came: {self.lines('actuation')[-5:]}"
            await asyncio.sleep(0.2)

    async def engines(self) -> list[dict[str, Any]]:
        async with self.session.get(self.admin + "/engines") as answer:
            return list((await answer.json())["engines"])

    async def ready(self, role: str) -> int:
        return sum(engine["state"] == "ready" and engine["role"] == role for engine in await self.engines())

    async def has(self, **ready: int) -> bool:
        return {role: await self.ready(role) for role in ready} == ready

    def lines(self, kind: str) -> list[dict[str, Any]]:
        entries = map(json.loads, self.log.read_text().splitlines())
        return [entry for entry in entries if entry["kind"] == kind]

    def happened(self, what: str) -> int:
        return sum(entry["what"] == what for entry in self.lines("actuation"))

    async def order(self, pool: str, replicas: int) -> None:
        async with self.session.post(self.planner + "/scale", json={"pool": pool, "replicas": replicas}) as answer:
            assert answer.status == 202, await answer.text()

    async def counted(self, name: str) -> float:
        """A counter of the proxy: what was handed over."""
        async with self.session.get(self.proxy + "/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return sum(
            float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{") and '"handed_over"' in line
        )


def engine_command(model: Path, *flags: str) -> str:
    """That of the tests' engines, as the planner wants it: `env` carries what they are told by their environment."""
    server = vllm_server("engine", model, model, VllmOptions(extra=flags), 1)
    words = ["env", *(f"{name}={value}" for name, value in server.env.items()), *server.command]
    words[words.index("--port") + 1] = "{port}"
    return shlex.join(words).replace("'{port}'", "{port}").replace("'{port+1000}'", "{port+1000}")


@asynccontextmanager
async def stand(folder: Path, settings: dict[str, Any]) -> AsyncIterator[Stand]:
    port, admin, control, first = free_port(), free_port(), free_port(), free_port()
    (folder / "engines").write_text("# the planner registers what it starts\n")
    proxy = ServerProcess(
        "dynamo-proxy",
        [
            str(BIN / "dynamo-proxy"), "--port", str(port), "--admin-port", str(admin), "--no-stream-resume",
            "--engines-file", str(folder / "engines"), "--no-kv-events", "--disagg-prefill-min-tokens", "16",
            "--disagg-prefill-max-queued-tokens", "1000000",
        ],
        f"http://127.0.0.1:{port}",
        folder / "proxy.log",
        health_path="/openapi.json",
    )  # fmt: skip
    common = {
        "proxy-admin": f"http://127.0.0.1:{admin}",
        "advisory": False,
        "port": control,
        "interval-seconds": 1,
        "decision-log": str(folder / "decisions.jsonl"),
        "engine-log-dir": str(folder / "engine-logs"),
        "engine-port-range": f"{first}-{first + 9}",
        "start-seconds": BOOT_SECONDS,
        "max-waiting-per-replica": 1000,
    }
    (folder / "planner.yaml").write_text(yaml.safe_dump(common | settings))
    planner = ServerProcess(
        "dynamo-planner",
        [str(BIN / "dynamo-planner"), "--config", str(folder / "planner.yaml")],
        f"http://127.0.0.1:{control}",
        folder / "planner.log",
    )
    async with AsyncExitStack() as stack:
        for server in (proxy, planner):
            stack.push_async_callback(asyncio.to_thread, server.stop, 180)
            await asyncio.to_thread(server.start().wait_ready)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)))
        yield Stand(session, proxy.url, str(common["proxy-admin"]), planner.url, folder / "decisions.jsonl")


async def ask_until_answered(here: Stand, waits: list[str]) -> dict[str, Any]:
    """As a client does that heeds Retry-After."""
    body = {"model": MODEL_NAME, "prompt": list(range(5, 45)), "max_tokens": 8, "ignore_eos": True}
    end = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < end:
        async with here.session.post(here.proxy + "/v1/completions", json=body) as answer:
            if answer.status == 200:
                return dict(await answer.json())
            assert answer.status == 503, await answer.text()
            waits.append(answer.headers["Retry-After"])
        await asyncio.sleep(float(waits[-1]))
    raise AssertionError("the request was never answered")


@pytest.mark.timeout(3000)
def test_a_request_wakes_a_sleeping_pool_and_is_answered(tmp_path: Path) -> None:
    async def story() -> None:
        model = make_model(tmp_path / "model")
        settings = {"engine-command": engine_command(model), "scale-to-zero-seconds": 5, "max-replicas": 2}
        async with stand(tmp_path, settings) as here:

            async def sleeps() -> bool:
                return here.lines("decision")[-1:] != [] and await here.engines() == []

            await here.until(sleeps, "sleep")
            assert {entry["decision"]["reason"] for entry in here.lines("decision")} == {"asleep"}
            waits: list[str] = []
            answers = await asyncio.gather(*(ask_until_answered(here, waits) for _ in range(4)))
            assert [answer["usage"]["completion_tokens"] for answer in answers] == [8] * 4
            assert waits, "they came while nothing ran"
            reasons = [entry["decision"]["reason"] for entry in here.lines("decision")]
            assert reasons.count("wake") == 1, "one start for four that wait"

            async def stopped() -> bool:
                return here.happened("stopped") == 1 and await here.engines() == []

            await here.until(stopped, "sleep again")
            assert here.happened("failed") == 0
            sys.stdout.write(f"4 requests, 0 lost; turned away {len(waits)} times while the engine booted\n")

    asyncio.run(story())


@pytest.mark.timeout(3000)
def test_two_pools_of_real_engines_are_sized_apart_and_lose_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        model = make_model(tmp_path / "model")
        ours = ("--kv-connector", "dynamo", "--kvbm-host-dram-gb", "0.02", "--kvbm-load-gate", "off", "--kvbm-role")
        ports = {role: free_port() for role in ("prefill", "decode")}
        pools = {
            "prefill": {
                "engine-command": engine_command(model, *ours, "prefill", "--kvbm-peer-port", "{port+1000}"),
                "target-ttft-ms": 60_000,
            },
            "decode": {"engine-command": engine_command(model, *ours, "decode"), "target-itl-ms": 10_000},
        }
        for role, pool in pools.items():
            more = {"role": role, "optimization-target": "sla", "stabilisation-seconds": 86_400, "max-replicas": 2}
            pool |= more | {"engine-port-range": f"{ports[role]}-{ports[role] + 9}"}
        async with stand(tmp_path, {"pools": pools, "max-gpus": 4}) as here:
            await here.until(lambda: here.has(prefill=1, decode=1), "one engine in each pool")
            load = Load(here.session, here.proxy)
            clients = [asyncio.create_task(load.client(number)) for number in range(3)]

            async def hands_over() -> bool:
                return await here.counted("dynamo_router_prefill_legs_total") >= 3

            await here.until(hands_over, "prompts of the prefill pool")
            await up_and_down(here, load, "decode", "prefill")
            await up_and_down(here, load, "prefill", "decode")
            load.is_over = True
            await asyncio.gather(*clients)
            legs = await here.counted("dynamo_router_prefill_legs_total")
            said = f"{load.whole} answers whole, {len(load.bad)} not; {legs:g} prompts computed by the prefill pool"
            sys.stdout.write(said + "\n")
            assert load.bad == []
            assert here.happened("failed") == 0
            last = {entry["pool"]: entry["decision"] for entry in here.lines("decision")}
            assert {pool: decision["current"] for pool, decision in last.items()} == {"prefill": 1, "decode": 1}
            assert "TTFT" in last["prefill"]["explanation"]
            assert "a token" in last["decode"]["explanation"]

    asyncio.run(story())


async def up_and_down(here: Stand, load: Load, pool: str, other: str) -> None:
    """One more in this pool, and one less again."""
    stopped = here.happened("stopped")
    await here.order(pool, 2)
    await here.until(lambda: here.has(**{pool: 2, other: 1}), f"two of {pool}")
    whole = load.whole

    async def has_answered() -> bool:
        return load.whole > whole + 6

    await here.until(has_answered, "answers of the larger pool")
    await here.order(pool, 1)

    async def is_stopped() -> bool:
        return here.happened("stopped") > stopped and await here.has(**{pool: 1, other: 1})

    await here.until(is_stopped, "the end of a drain")
