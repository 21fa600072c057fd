"""Turns a failing device off after errors in a row, and lets one operation probe it now and then. Time is given."""

from __future__ import annotations


class Circuit:
    """Closed: everything passes. Open: nothing does, except one probe each `retry_seconds`. Owner serialises calls."""

    def __init__(self, errors_to_open: int, retry_seconds: float) -> None:
        self._errors_to_open = errors_to_open
        self._retry_seconds = retry_seconds
        self._errors_in_a_row = 0
        self._next_probe: float | None = None

    @property
    def is_open(self) -> bool:
        return self._next_probe is not None

    def admits(self, now: float) -> bool:
        """Whether an operation may start now. While open, True makes the caller the probe."""
        if self._next_probe is None:
            return True
        if now < self._next_probe:
            return False
        self._next_probe = now + self._retry_seconds
        return True

    def note_success(self) -> bool:
        """True when this closed the circuit."""
        was_open, self._next_probe = self.is_open, None
        self._errors_in_a_row = 0
        return was_open

    def note_error(self, now: float) -> bool:
        """True when this opened the circuit."""
        self._errors_in_a_row += 1
        if self.is_open or self._errors_in_a_row < self._errors_to_open:
            return False
        self._next_probe = now + self._retry_seconds
        return True

    def check(self) -> None:
        assert self._errors_in_a_row >= 0
        assert not self.is_open or self._errors_in_a_row >= self._errors_to_open, "open without errors"
