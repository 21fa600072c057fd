"""Sees that another thread has not come round for too long: it stands in a call that does not return."""

from __future__ import annotations

import threading
from collections.abc import Callable

_LOOK_SECONDS = 0.25


class Watchdog:
    """`act` is called, on a thread of its own, at every look while the watched thread stands; it must not wait for it.

    Looks are counted, not seconds: a process that was stopped as a whole has not looked either.
    """

    def __init__(self, patience_seconds: float, act: Callable[[], None]) -> None:
        self._most_looks = max(1, round(patience_seconds / _LOOK_SECONDS))
        self._act = act
        self._rounds = 0
        self._looks_since = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvbm-peer-watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """The watched thread has come round. It does so every half second, whatever happens."""
        self._rounds += 1
        self._looks_since = 0

    @property
    def is_alarmed(self) -> bool:
        return self._looks_since >= self._most_looks

    def close(self) -> None:
        """Idempotent."""
        self._closing.set()
        self._thread.join()

    def check(self) -> None:
        assert 0 <= self._looks_since <= self._most_looks, "it looks on and does nothing"

    def _run(self) -> None:
        rounds = self._rounds
        while not self._closing.wait(_LOOK_SECONDS):
            if self._rounds != rounds:
                rounds, self._looks_since = self._rounds, 0
                continue
            self._looks_since = min(self._looks_since + 1, self._most_looks)
            if self.is_alarmed:
                self._act()
