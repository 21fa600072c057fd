"""Whether a load is worth its wait: measured loads against measured prefill. Pure; times are arguments.

A load of n blocks from a tier is expected to take latency + n * seconds per block, computing them n * seconds per block
of prefill. Both are learnt online. Before something is learnt about a tier, or about prefill, every load is admitted.
A tier that is refused is tried now and then, else its recovery would never be seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: Weight of the newest sample: the last ten or so decide.
_WEIGHT = 0.1
#: A sample that is further off than this, against what was learnt, counts as this far off: a pause of the machine, a
#: clock that was set, must not turn the gate at once; a real change still shows within a few samples.
_MOST_OFF = 4.0
#: Of the loads that would be refused, one in so many is tried, with at most so many blocks.
EXPLORE_ONE_IN = 16
EXPLORE_BLOCKS = 4
#: Nothing that reports less or more than this was measured: no host reads faster, and no load is waited for longer.
_FASTEST_BYTES_PER_SECOND = 1e13
_LONGEST_SECONDS = 600.0


@dataclass
class _Line:
    """seconds = latency + size * slope, fitted to samples that fade (means of size, seconds and their products)."""

    size: float = 0.0
    seconds: float = 0.0
    size_square: float = 0.0
    product: float = 0.0
    samples: int = 0

    def learn(self, size: float, seconds: float) -> None:
        if self.samples:
            expected = self.predict(size)
            seconds = min(max(seconds, expected / _MOST_OFF), expected * _MOST_OFF)
        self.samples += 1
        weight = max(_WEIGHT, 1 / self.samples)
        self.size += weight * (size - self.size)
        self.seconds += weight * (seconds - self.seconds)
        self.size_square += weight * (size * size - self.size_square)
        self.product += weight * (size * seconds - self.product)

    def predict(self, size: float) -> float:
        latency, slope = self.fit()
        return latency + size * slope

    def fit(self) -> tuple[float, float]:
        """(latency, slope), neither below 0. With sizes all alike, everything is slope."""
        spread = self.size_square - self.size * self.size
        slope = self.seconds / self.size
        if spread > 1e-3 * self.size_square:
            covariance = self.product - self.size * self.seconds
            slope = min(slope, max(0.0, covariance / spread))
        return max(0.0, self.seconds - slope * self.size), slope


class LoadGate:
    def __init__(self) -> None:
        self._loads: dict[str, _Line] = {}
        self._prefill = _Line()
        #: Tier -> loads refused since the last one that was tried.
        self._refused: dict[str, int] = {}

    def observe_load(self, tier: str, num_bytes: int, seconds: float) -> None:
        """One load from `tier` took that long. What cannot have been measured is left out."""
        if num_bytes > 0 and num_bytes / _FASTEST_BYTES_PER_SECOND < seconds < _LONGEST_SECONDS:
            self._loads.setdefault(tier, _Line()).learn(num_bytes, seconds)

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """The engine computed that many prompt tokens in that time."""
        if tokens > 0 and 0 < seconds < _LONGEST_SECONDS and not math.isnan(seconds):
            self._prefill.learn(tokens, seconds)
