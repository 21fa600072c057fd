"""The drained stop that an actuator has under way, at most one, and what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from .actuator import Happening, Outcome
from .drained_stop import DrainedStop, Stopper
from .replica import Surroundings


class StopInHand:
    """Begins a stop, takes it back before its order, and books its end once."""

    def __init__(self, stopper: Stopper, around: Surroundings) -> None:
        self._stopper = stopper
        self._around = around
        self._stop: DrainedStop | None = None
        self._task: asyncio.Task[list[Happening]] | None = None

    @property
    def urls(self) -> tuple[str, ...]:
        """Those on their way out."""
        return self._stop.urls if self._stop is not None else ()

    @property
    def is_running(self) -> bool:
        return self._stop is not None

    def begin(self, urls: Sequence[str]) -> None:
        assert self._stop is None, "an earlier stop is still under way"
        self._stop = DrainedStop(tuple(urls), self._stopper, self._around)
        self._task = asyncio.get_running_loop().create_task(self._stop.run())

    def take_back(self) -> Outcome | None:
        """Give the victims back their work, or None where nothing can be taken back any more."""
        if self._stop is None or self._stop.is_ordered:
            return None
        self._stop.keep = True
        return Outcome(True, "kept", (f"taking back the drain of {', '.join(self._stop.urls)}",))

    def book(self) -> list[Happening]:
        """What came of a stop that has ended, once."""
        stop, task = self._stop, self._task
        if stop is None or task is None or not task.done():
            return []
        self._stop = self._task = None
        if task.cancelled():
            return []
        error = task.exception()
        if error is not None:
            return [Happening(url, "failed", "stop_failed", repr(error)) for url in stop.urls]
        return task.result()

    async def close(self) -> list[Happening]:
        """Take it back, or give up waiting for it after `resume_seconds`; what came of it."""
        if self._stop is None or self._task is None:
            return []
        self._stop.keep = True
        await asyncio.wait({self._task}, timeout=self._around.limits.resume_seconds)
        if not self._task.done():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        return self.book()

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        assert (self._stop is None) == (self._task is None), "a stop without its task"
