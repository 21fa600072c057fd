"""A circuit breaker per engine: requests that fail open it, time and one request that passes close it again.

closed -> open (too many failures of late) -> half open (time is over: one request may try) -> trial (it is under way)
-> closed, or open for twice as long. Health probes cannot do this: an engine may answer them and fail every request.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

FADE = 0.9  # of a failure's weight, per request answered since
TRIP_SCORE = 4.09  # five failures in a row, or about four in ten for a while
FIRST_SECONDS, LONGEST_SECONDS = 5.0, 60.0
_NOTHING = 0.05


class Circuit(Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    TRIAL = "trial"


class Breaker:
    """One engine's breaker. The clock is an argument."""

    __slots__ = ("_seconds", "blocks", "on_change", "score", "state", "until")

    def __init__(self) -> None:
        self.state = Circuit.CLOSED
        self.blocks = False  # no request may go there (read at every placement)
        self.score = 0.0
        self.until = 0.0
        self.on_change: Callable[[], None] = lambda: None  # `blocks` may have changed
        self._seconds = FIRST_SECONDS

    def failed(self, now: float) -> bool:
        """A request failed. True if that opened the breaker."""
        self.score = self.score * FADE + 1
        if self.state is Circuit.OPEN or (self.state is Circuit.CLOSED and self.score < TRIP_SCORE):
            return False
        if self.state is not Circuit.CLOSED:
            self._seconds = min(self._seconds * 2, LONGEST_SECONDS)
        self._open(now)
        return True

    def trip(self, now: float) -> None:
        """Leave it alone for a while, whatever it answers."""
        self.score = max(self.score, TRIP_SCORE)
        if self.state is not Circuit.CLOSED:
            self._seconds = min(self._seconds * 2, LONGEST_SECONDS)
        self._open(now)

    def _open(self, now: float) -> None:
        self._set(Circuit.OPEN)
        self.until = now + self._seconds

    def passed(self) -> None:
        """A request was answered. Needed only while `score` is not 0."""
        self.score *= FADE
        if self.state is Circuit.CLOSED:
            if self.score < _NOTHING:
                self.score = 0.0
        elif self.state is not Circuit.OPEN:  # answers that began before it opened prove nothing
            self.reset()

    def tick(self, now: float) -> None:
        """Look at the clock: may one request try again?"""
        if self.state is Circuit.OPEN and now >= self.until:
            self._set(Circuit.HALF_OPEN)

    def began(self) -> None:
        """A request goes there; when half open it is the only one."""
        if self.state is Circuit.HALF_OPEN:
            self._set(Circuit.TRIAL)

    def left(self) -> None:
        """A request left, however it ended. A trial without an outcome is no outcome."""
        if self.state is Circuit.TRIAL:
            self._set(Circuit.HALF_OPEN)

    def reset(self) -> None:
        self._set(Circuit.CLOSED)
        self.score, self._seconds = 0.0, FIRST_SECONDS

    def _set(self, state: Circuit) -> None:
        self.state = state
        self.blocks = state in (Circuit.OPEN, Circuit.TRIAL)
        self.on_change()

    def check(self) -> None:
        assert self.blocks == (self.state in (Circuit.OPEN, Circuit.TRIAL)), f"{self.state}, blocks {self.blocks}"
        assert self.score >= 0, "a negative failure score"
        assert self.state is Circuit.CLOSED or self.score > 0, "open without a failure"
