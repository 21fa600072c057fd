"""One thread with an event loop: all requests of a store at once, each of which can be given up at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for other threads until `close`."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts `work`. Cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def cancel_all(self) -> Future[None]:
        """Cancels what runs, from the loop's own thread: never in the middle of a step."""
        return asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop)

    def close(self, deadline: float) -> bool:
        """Cancels what runs, and ends the thread by `deadline` (of `time.monotonic`). False when it does not end.

        Idempotent.
        """
        if self._loop.is_closed():
            return True
        self.cancel_all().add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._loop.stop))
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            return False
        # Two who cancel at one time cancel each other, and then not everything has ended.
        self._loop.run_until_complete(_cancel_all())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()
        return True


async def _cancel_all() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
