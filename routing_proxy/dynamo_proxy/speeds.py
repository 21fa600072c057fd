"""Which engine is slow: not by a clock, but beside what the learnt prices say of every engine's first tokens."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

_WEIGHT = 0.2  # of the newest first token
_SEEN = 10  # first tokens before an engine is compared, and others to compare it with
_OTHERS = 2
_TIMES = 5.0  # as slow as the middle one of the others
_EXCESS_SECONDS = 0.2  # and so much later than predicted: below that it is noise
_LEAST_SECONDS = 0.02  # of a prediction


@dataclass(slots=True)
class _Speed:
    """Of one engine: measured over predicted time, seconds beyond the prediction, and how often it was seen."""

    times: float = 1.0
    excess_seconds: float = 0.0
    seen: int = 0


class Speeds:
    """First tokens of all engines."""

    def __init__(self) -> None:
        self._speeds: dict[int, _Speed] = {}

    def observe(self, slot: int, predicted_seconds: float, seconds: float) -> bool:
        """An engine gave a first token. True if it is an outlier; it starts anew then."""
        speed = self._speeds.get(slot)
        if speed is None:
            speed = self._speeds[slot] = _Speed()
        predicted = max(predicted_seconds, _LEAST_SECONDS)
        speed.times += _WEIGHT * (seconds / predicted - speed.times)
        speed.excess_seconds += _WEIGHT * (seconds - predicted - speed.excess_seconds)
        speed.seen += 1
        if speed.seen < _SEEN or speed.excess_seconds < _EXCESS_SECONDS:
            return False
        others = [s.times for other, s in self._speeds.items() if other != slot and s.seen >= _SEEN]
        if len(others) < _OTHERS or speed.times < _TIMES * median(others):
            return False
        del self._speeds[slot]
        return True

    def forget(self, slot: int) -> None:
        """Its number goes to another engine."""
        self._speeds.pop(slot, None)

    def check(self) -> None:
        for slot, speed in self._speeds.items():
            assert speed.seen > 0, f"slot {slot} was never seen"
            assert speed.times >= 0, f"slot {slot} answers before it is asked"
