"""A rolling restart: every replica that was there is replaced, one at a time, and the first one that fails ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from .actuator import Happening

ReplaceOne = Callable[[str], Awaitable[str]]
"""Replaces one replica and returns nothing, or why it could not be."""


class RollingRestart:
    """At most one under way. `replace_one` does the work; `urls` are those that were there when it began."""

    def __init__(self) -> None:
        self._task: asyncio.Task[list[Happening]] | None = None

    @property
    def is_running(self) -> bool:
        return self._task is not None and not self._task.done()

    def begin(self, urls: Sequence[str], replace_one: ReplaceOne) -> None:
        self._task = asyncio.get_running_loop().create_task(_roll(urls, replace_one))

    def take(self) -> list[Happening]:
        """What came of it, once."""
        task = self._task
        if task is None or not task.done():
            return []
        self._task = None
        if task.cancelled():
            return []
        error = task.exception()
        return [Happening("", "failed", "restart_failed", repr(error))] if error is not None else task.result()

    async def end(self) -> None:
        """Give it up; what is replaced stays replaced."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


async def _roll(urls: Sequence[str], replace_one: ReplaceOne) -> list[Happening]:
    for number, url in enumerate(urls):
        reason = await replace_one(url)
        if reason:
            text = f"the rolling restart ends here: {len(urls) - number} of {len(urls)} are not replaced"
            return [Happening(url, "failed", reason, text)]
    return [Happening("", "restarted", "", f"all {len(urls)} replicas were replaced")]
