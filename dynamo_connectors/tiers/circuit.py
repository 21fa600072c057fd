"""Turns a failing device or service off after errors in a row, and lets a probe find it alive again. Time is given.

Closed: everything passes. Open: nothing does, except one probe at the end of each pause; pauses double from probe to
probe, up to a bound. Any success closes it, also of an operation that set out before: the other side works. Errors
while it is open change nothing, so a burst counts once.
"""

from __future__ import annotations


class Circuit:
    """Its owner serialises the calls. Who was admitted reports back with `note_success` or `note_error`."""

    def __init__(self, errors_to_open: int, retry_seconds: float, max_retry_seconds: float | None = None) -> None:
        self._errors_to_open = errors_to_open
        self._retry_seconds = retry_seconds
        self._max_retry_seconds = retry_seconds if max_retry_seconds is None else max_retry_seconds
        self._errors_in_a_row = 0
        self._pause_seconds = retry_seconds
        self._next_probe: float | None = None

    @property
    def is_open(self) -> bool:
        return self._next_probe is not None

    def refuses(self, now: float) -> bool:
        """Whether `admits` would say no. Changes nothing."""
        next_probe = self._next_probe
        return next_probe is not None and now < next_probe

    def admits(self, now: float) -> bool:
        """Whether an operation may start now. While open, True makes the caller the probe."""
        if self.refuses(now):
            return False
        if self.is_open:
            self._pause_seconds = min(2 * self._pause_seconds, self._max_retry_seconds)
            self._next_probe = now + self._pause_seconds
        return True

    def note_success(self) -> bool:
        """True when this closed the circuit."""
        was_open, self._next_probe = self.is_open, None
        self._errors_in_a_row = 0
        self._pause_seconds = self._retry_seconds
        return was_open

    def note_error(self, now: float) -> bool:
        """True when this opened the circuit."""
        self._errors_in_a_row += 1
        if self.is_open or self._errors_in_a_row < self._errors_to_open:
            return False
        self._next_probe = now + self._pause_seconds
        return True

    def check(self) -> None:
        """Asserts every invariant."""
        assert self._errors_in_a_row >= 0, "negative errors"
        assert self.is_open == (self._errors_in_a_row >= self._errors_to_open), (
            "open without errors, or closed with them"
        )
        assert self.is_open or self._pause_seconds == self._retry_seconds, "a closed circuit kept its back-off"
        assert self._retry_seconds <= self._pause_seconds <= self._max_retry_seconds, "the pause is out of bounds"
