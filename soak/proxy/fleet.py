"""Real engines, each behind a gate, and what is done to them while requests run."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp

from soak.proxy.gate import Gate
from tools.server_process import ServerProcess, members_of

BOOT_SECONDS = 900.0
#: After the last fault of a shift: longer than a request that met it waits for its first byte.
SETTLE_SECONDS = 65.0
_SHIFT_SECONDS = 150.0


@dataclass
class Engine:
    """One engine, its gate, and whether a fault holds it."""

    server: ServerProcess
    gate: Gate
    fault: asyncio.Task[None] | None = None

    @property
    def is_well(self) -> bool:
        return self.fault is None or self.fault.done()

    @property
    def url(self) -> str:
        """As the proxy knows it."""
        return f"http://127.0.0.1:{self.gate.port}"

    def signal(self, number: signal.Signals) -> None:
        assert self.server.process is not None
        for process in members_of(self.server.process.pid):
            os.kill(process, number)

    async def boot(self) -> None:
        """Starts it on this thread: the kernel ends an engine with the thread that started it."""
        self.server.start()
        await self.wait_ready()

    async def wait_ready(self) -> None:
        deadline = time.monotonic() + BOOT_SECONDS
        while not await asyncio.to_thread(self.server.is_healthy):
            assert self.server.process is not None
            if self.server.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.server.name} did not come up (log: {self.server.log})")
            await asyncio.sleep(0.5)


@dataclass
class Chaos:
    """Breaks every engine but one, at random; which one is left alone changes when all are well again."""

    engines: list[Engine]
    admin_url: str
    session: aiohttp.ClientSession
    rng: random.Random
    pause_seconds: float
    done: Counter[str] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)

    async def run(self, seconds: float) -> None:
        """Returns when every engine is well again."""
        over, shift = time.monotonic() + seconds, 0
        faults: dict[str, Callable[[Engine], Awaitable[None]]] = {
            "killed": self._kill, "ended": self._end, "stopped": self._stop, "hung": self._hang, "slow": self._slow,
            "refusing": self._refuse, "cut": self._cut, "drained": self._drain,
        }  # fmt: skip
        weights = [1, 1, 3, 3, 3, 3, 3, 3]
        while time.monotonic() < over:
            left_alone = self.engines[shift % len(self.engines)]
            shift, shift_over = shift + 1, min(over, time.monotonic() + _SHIFT_SECONDS)
            while time.monotonic() < shift_over:
                await asyncio.sleep(self.rng.expovariate(1 / self.pause_seconds))
                victims = [engine for engine in self.engines if engine.is_well and engine is not left_alone]
                if victims:
                    victim = self.rng.choice(victims)
                    (name,) = self.rng.choices(list(faults), weights)
                    self.done[name] += 1
                    self._note(f"{victim.server.name} {name}")
                    victim.fault = asyncio.ensure_future(faults[name](victim))
            await asyncio.gather(*(engine.fault for engine in self.engines if engine.fault is not None))
            self._note("all are well")
            await asyncio.sleep(SETTLE_SECONDS)

    def _note(self, line: str) -> None:
        self.log.append(f"{time.strftime('%H:%M:%S')} {line}")

    async def _some_time(self, least: float, most: float) -> None:
        await asyncio.sleep(self.rng.uniform(least, most))

    async def _again(self, engine: Engine) -> None:
        await engine.boot()
        self._note(f"{engine.server.name} is back")

    async def _kill(self, engine: Engine) -> None:
        await asyncio.to_thread(engine.server.kill)
        await self._again(engine)

    async def _end(self, engine: Engine) -> None:
        """As an orchestrator ends it that tells nobody."""
        await asyncio.to_thread(engine.server.stop)
        await self._again(engine)

    async def _stop(self, engine: Engine) -> None:
        engine.signal(signal.SIGSTOP)
        await self._some_time(5, 70)
        engine.signal(signal.SIGCONT)

    async def _hang(self, engine: Engine) -> None:
        await self._gate(engine, "hang", 5, 70)

    async def _slow(self, engine: Engine) -> None:
        await self._gate(engine, "slow", 10, 30)

    async def _refuse(self, engine: Engine) -> None:
        await self._gate(engine, "refuse", 5, 20)

    async def _gate(self, engine: Engine, mode: str, least: float, most: float) -> None:
        engine.gate.set(mode)
        await self._some_time(least, most)
        engine.gate.set("pass")

    async def _cut(self, engine: Engine) -> None:
        engine.gate.cut()

    async def _drain(self, engine: Engine) -> None:
        for what in ("drain", "resume"):
            async with self.session.post(f"{self.admin_url}/engines/{what}", json={"url": engine.url}) as answer:
                answer.raise_for_status()
            if what == "drain":
                await self._some_time(5, 20)
