"""All pools of one planner: they look together, share one GPU budget, and act together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace

from .actuator import Outcome
from .budget import ceilings
from .decision import wish
from .errors import ActuationError
from .memory_file import MemoryFile
from .planner import Planner
from .records import Decision


class Fleet:
    """The pools by name. `max_gpus` bounds them together; None: no common bound."""

    def __init__(
        self, planners: Mapping[str, Planner], max_gpus: int | None = None, memory_file: MemoryFile | None = None
    ) -> None:
        self.planners = dict(planners)
        self._max_gpus = max_gpus
        self._memory_file = memory_file

    @property
    def first(self) -> Planner:
        """The pools share log, metrics and console: any of them will do."""
        return next(iter(self.planners.values()))

    def resume(self) -> None:
        """Take over what an earlier planner had learnt. Raises ConfigError if the file's folder cannot be written."""
        if self._memory_file is None:
            return
        parts = self.first.parts
        memories, said = self._memory_file.load(parts.clock(), parts.wall())
        for name, memory in memories.items():
            if name in self.planners:
                self.planners[name].memory = memory
        parts.say(said)

    async def tick(self, orders: Mapping[str, int] | None = None) -> dict[str, tuple[Decision, Outcome]]:
        """One tick of every pool. `orders` are replica counts given by hand, by pool."""
        given = orders or {}
        async with AsyncExitStack() as locks:
            for _, planner in sorted(self.planners.items()):
                await locks.enter_async_context(planner.lock)
            names = list(self.planners)
            looks = await asyncio.gather(*(self.planners[name].look(given.get(name)) for name in names))
            inputs = dict(zip(names, looks, strict=True))
            if self._max_gpus is not None:
                most = ceilings({name: wish(seen) for name, seen in inputs.items()}, self._max_gpus)
                inputs = {name: replace(seen, ceiling=most[name]) for name, seen in inputs.items()}
            done = {name: await self.planners[name].finish(seen) for name, seen in inputs.items()}
            if self._memory_file is not None:
                memories = {name: planner.memory for name, planner in self.planners.items()}
                self._memory_file.save(memories, self.first.parts.wall())
            return done

    async def order(self, pool: str, replicas: int) -> tuple[Decision, Outcome]:
        """A manual order for one pool. Raises ActuationError if there is no such pool or the order cannot be taken."""
        if pool not in self.planners:
            raise ActuationError("no_such_pool", f"no pool {pool!r}; there are: {', '.join(self.planners)}")
        self.planners[pool].admit(replicas)
        return (await self.tick({pool: replicas}))[pool]

    async def run(self, interval_seconds: float, stop: asyncio.Event) -> None:
        """Tick until `stop` is set; a tick under way is then abandoned, never an actuation under way."""
        stopped = asyncio.ensure_future(stop.wait())
        try:
            while not stop.is_set():
                ticking = asyncio.ensure_future(self.tick())
                await asyncio.wait({ticking, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not ticking.done():
                    ticking.cancel()
                    await asyncio.gather(ticking, return_exceptions=True)
                    return
                error = ticking.exception()
                if error is not None:
                    self.first.survive(error)
                await asyncio.wait({stopped}, timeout=interval_seconds)
        finally:
            stopped.cancel()

    async def close(self) -> None:
        """Close every pool, all at once: their drains share the time there is."""
        ends = await asyncio.gather(*(planner.close() for planner in self.planners.values()), return_exceptions=True)
        errors = [end for end in ends if isinstance(end, BaseException)]
        if errors:
            raise errors[0]

    def kill_now(self) -> None:
        for planner in self.planners.values():
            planner.parts.actuator.kill_now()

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        for name, planner in self.planners.items():
            assert planner.pool == name, f"the planner of {planner.pool} is booked under {name}"
            planner.check()
