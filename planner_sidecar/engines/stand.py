"""dynamo-planner and dynamo-proxy as their users run them, over local vLLM engines that the planner starts."""

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
import yaml

from tools.server_process import ServerProcess, free_port
from tools.vllm_server import VllmOptions, vllm_server

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
