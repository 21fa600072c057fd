"""A circuit breaker: a store that fails costs requests nothing until a probe finds it alive. Pure; time is an argument.

    CLOSED --failures in a row--> OPEN --pause over--> PROBING --success--> CLOSED
                                   ^                      |
                                   +------- failure ------+   (each time with twice the pause)

While OPEN nothing passes, while PROBING one request has. Any success closes it, also one of a request that set out
before: the store answers. Any failure of such a request changes nothing while OPEN, so a burst counts once.
"""

from __future__ import annotations

from enum import Enum


class CircuitState(Enum):
    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


class Circuit:
    """Whoever was allowed to pass reports back with `succeeded` or `failed`, whatever happens. Not thread-safe."""

    def __init__(
        self, max_failures: int = 3, first_pause_seconds: float = 1.0, max_pause_seconds: float = 60.0
    ) -> None:
        self._max_failures = max_failures
        self._first_pause_seconds = first_pause_seconds
        self._max_pause_seconds = max_pause_seconds
        self.state = CircuitState.CLOSED
        self._failures = 0
        self._pause_seconds = first_pause_seconds
        self._refuses_until = 0.0
        #: How often it opened from CLOSED, for a metric.
        self.opened_total = 0

    def refuses(self, now: float) -> bool:
        """Whether `allow` would say no. Changes nothing, and may be asked from any thread."""
        return self.state is CircuitState.PROBING or (self.state is CircuitState.OPEN and now < self._refuses_until)

    def allow(self, now: float) -> bool:
        """Whether a request may set out now; the first one after the pause is the probe."""
        if self.refuses(now):
            return False
        if self.state is CircuitState.OPEN:
            self.state = CircuitState.PROBING
        return True

    def succeeded(self) -> None:
        self.state = CircuitState.CLOSED
        self._failures = 0
        self._pause_seconds = self._first_pause_seconds

    def failed(self, now: float) -> None:
        if self.state is CircuitState.CLOSED:
            self._failures += 1
            if self._failures >= self._max_failures:
                self.opened_total += 1
                self._open(now)
        elif self.state is CircuitState.PROBING:
            self._pause_seconds = min(2 * self._pause_seconds, self._max_pause_seconds)
            self._open(now)

    def check(self) -> None:
        """Asserts every invariant."""
        assert 0 <= self._failures <= self._max_failures, f"{self._failures} failures counted"
        if self.state is CircuitState.CLOSED:
            assert self._failures < self._max_failures, "it should have opened"
            assert self._pause_seconds == self._first_pause_seconds, "a closed circuit kept its back-off"
        assert self._first_pause_seconds <= self._pause_seconds <= self._max_pause_seconds, "the pause is out of bounds"

    def _open(self, now: float) -> None:
        self.state = CircuitState.OPEN
        self._refuses_until = now + self._pause_seconds
