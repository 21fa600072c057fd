"""A lane: a few threads that take tasks in order, survive whatever a task raises, and can be left behind.

Unlike a `ThreadPoolExecutor` its threads do not keep the interpreter alive: one that hangs in a dead disk must not hang
the engine's exit as well.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from dynamo_connectors.errors import ConfigError

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Lane:
    """`threads` threads named `name`. Every submitted task's future ends: with a result, an error, or cancelled."""

    def __init__(self, name: str, threads: int) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._stopped = False
        self._threads: list[threading.Thread] = []
        try:
            for number in range(threads):
                thread = threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError as error:
            self.stop(time.monotonic() + 1)
            raise ConfigError(f"the host refuses another thread ({error}); raise the limit (ulimit -u)") from error

    def submit(self, task: Callable[[], Result]) -> Future[Result]:
        """Never blocks and never raises. On a stopped lane the future is cancelled."""
        future: Future[Result] = Future()
        with self._lock:
            if not self._stopped:
                self._queue.put((future, task))
                return future
        _cancel(future)
        return future

    def stop(self, deadline: float) -> bool:
        """Cancels what has not started and waits for the rest until `deadline` (of `time.monotonic`).

        False when a thread is still busy then: it is left behind. Idempotent.
        """
        with self._lock:
            self._stopped = True
        try:
            while True:
                entry = self._queue.get_nowait()
                if entry is not None:
                    _cancel(entry[0])
        except queue.Empty:
            pass
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while True:
            entry = None
            try:
                entry = self._queue.get()
                if entry is None:
                    return
                self._run(*entry)
            except BaseException as error:  # noqa: BLE001 - the boundary of a thread: it must outlive any task
                if entry is not None and not entry[0].done():
                    entry[0].set_exception(error)

    @staticmethod
    def _run(future: Future[Any], task: Callable[[], Any]) -> None:
        if future.set_running_or_notify_cancel():
            future.set_result(task())


def _cancel(future: Future[Any]) -> None:
    future.cancel()
    future.set_running_or_notify_cancel()  # else those who wait for it sleep on
