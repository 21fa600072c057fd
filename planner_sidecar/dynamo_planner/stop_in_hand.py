"""The drained stop that an actuator has under way, at most one, and what there is to tell of its replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence

from .actuator import Happening, Outcome
from .drained_stop import DrainedStop, Stopper
from .errors import ActuationError
from .replica import Surroundings


class StopInHand:
    """Begins a stop, takes it back before its order, and books its end once."""

    def __init__(self, stopper: Stopper, around: Surroundings) -> None:
        self._stopper = stopper
        self._around = around
        self._stop: DrainedStop | None = None
        self._task: asyncio.Task[list[Happening]] | None = None
        self._happenings: list[Happening] = []

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

    async def attempt(self, move: Awaitable[Outcome]) -> Outcome:
        """A move up or down, after the end of an earlier stop was booked; its failure is an outcome too."""
        self.book()
        try:
            return await move
        except ActuationError as error:
            return Outcome(False, error.reason, (str(error),))

    def note(self, happening: Happening) -> None:
        self._happenings.append(happening)

    def take(self) -> list[Happening]:
        """What happened since the last call."""
        self.book()
        taken, self._happenings = self._happenings, []
        return taken

    def book(self) -> None:
        """Note what came of a stop that has ended, once."""
        stop, task = self._stop, self._task
        if stop is None or task is None or not task.done():
            return
        self._stop = self._task = None
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self._happenings += [Happening(url, "failed", "stop_failed", repr(error)) for url in stop.urls]
        else:
            self._happenings += task.result()

    async def close(self) -> None:
        """Take it back, or give up waiting for it after `resume_seconds`."""
        if self._stop is None or self._task is None:
            return
        self._stop.keep = True
        await asyncio.wait({self._task}, timeout=self._around.limits.resume_seconds)
        if not self._task.done():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.book()

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        assert (self._stop is None) == (self._task is None), "a stop without its task"
