"""Whether a load is worth its wait: measured loads against measured prefill. Pure; times are arguments.

A load is expected to take a latency per tier, plus a time per byte; computing takes a time per token. Both are lines
through the last few samples, fitted by medians (Theil and Sen), so that a few absurd samples change nothing and a real
change shows after half a window.

Before there are enough samples for a line, a load is refused when even the kindest reading of what is there, samples or
a measurement at start-up, is clearly slower than computing. Where there is nothing, loads are admitted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import combinations, groupby
from statistics import median

#: Samples that count. Five of nine that agree decide, in either direction.
WINDOW = 9
#: Before so many samples no line is drawn through them.
LEAST_SAMPLES = 3
#: What is not a line yet may be off by this much.
DOUBT = 1.5
#: Two samples tell a latency from a rate only when they are that far apart, as a share of the largest.
_APART = 0.25
#: A refused tier must be seen to recover: of so many refusals in a row, the last is tried with a few blocks. While all
#: samples are of one size, with twice as many as the last time: they take a latency for a rate.
EXPLORE_ONE_IN = 16
EXPLORE_BLOCKS = 4
#: A first load may be slow for reasons of its own (kernels are compiled, pages touched): it is doubted sooner.
EXPLORE_YOUNG_ONE_IN = 4
#: Outside of these nothing was measured: a clock was set, or a report is wrong.
_MOST_BYTES_PER_SECOND = 1e13
_MOST_TOKENS_PER_SECOND = 1e9
_LONGEST_SECONDS = 600.0


class Line:
    """seconds = latency + size * slope, neither below 0."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        #: Said beforehand; forgotten with the first sample.
        self._expected_slope: float | None = None
        self.latency = 0.0
        self.slope = 0.0
        #: Whether the samples tell a latency from a rate.
        self.tells_apart = False

    @property
    def is_known(self) -> bool:
        return len(self._samples) >= LEAST_SAMPLES

    def expect(self, slope: float) -> None:
        self._expected_slope = slope

    def seconds(self, size: float) -> float | None:
        """What `size` takes; with too few samples the least that they allow; None when there is nothing to go by.

        The least: no more than a sample of less took, and of a sample of more its share.
        """
        if self.is_known:
            return self.latency + size * self.slope
        if self._samples:
            return min(seconds * min(1.0, size / known) for known, seconds in self._samples)
        return None if self._expected_slope is None else size * self._expected_slope

    @property
    def has_samples(self) -> bool:
        return bool(self._samples)

    def learn(self, size: float, seconds: float) -> None:
        self._samples.append((size, seconds))
        # With sizes all alike, everything is slope.
        self.slope = median(seconds / size for size, seconds in self._samples)
        slopes = self._slopes()
        self.tells_apart = len(slopes) >= LEAST_SAMPLES
        if self.tells_apart:
            self.slope = min(self.slope, max(0.0, median(slopes)))
        self.latency = max(0.0, median(seconds - self.slope * size for size, seconds in self._samples))

    def _slopes(self) -> list[float]:
        """Between the samples that are far enough apart."""
        least = _APART * max((size for size, _ in self._samples), default=0.0)
        return [
            (one[1] - two[1]) / (one[0] - two[0])
            for one, two in combinations(self._samples, 2)
            if abs(one[0] - two[0]) >= least
        ]


class LoadGate:
    """One per engine, or per tensor-parallel group: sizes must mean the same in what is observed and asked."""

    def __init__(self) -> None:
        self._loads: dict[str, Line] = {}
        self._prefill = Line()
        #: Tier -> times it was refused since the last load from it was seen or tried.
        self._refusals: dict[str, int] = {}
        #: Tier -> blocks of it that were tried last, while its samples were of one size.
        self._tried: dict[str, int] = {}

    def observe_load(self, tier: str, num_bytes: int, seconds: float) -> None:
        """A load from `tier` took that long. One that failed late counts with the bytes that were asked for."""
        if _is_measured(num_bytes, seconds, _MOST_BYTES_PER_SECOND):
            self._loads.setdefault(tier, Line()).learn(num_bytes, seconds)
            self._refusals.pop(tier, None)

    def expect_load(self, tier: str, bytes_per_second: float) -> None:
        """What was measured of `tier` before any request; the first load that is observed says more."""
        if 0 < bytes_per_second < _MOST_BYTES_PER_SECOND:
            self._loads.setdefault(tier, Line()).expect(1 / bytes_per_second)

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """The engine computed that many prompt tokens in that time."""
        if _is_measured(tokens, seconds, _MOST_TOKENS_PER_SECOND):
            self._prefill.learn(tokens, seconds)

    def admit(self, run: Sequence[str], block_bytes: int, block_tokens: int) -> int:
        """How many of the leading blocks are worth loading; `run` names the tier of each block.

        The number that saves the most time. A few more, now and then, to see whether a refused tier has recovered.
        """
        best = self._best(run, block_bytes, block_tokens)
        if best == len(run):
            return best
        tier = run[best]
        refusals = self._refusals.get(tier, 0) + 1
        if refusals < (EXPLORE_ONE_IN if self._loads[tier].is_known else EXPLORE_YOUNG_ONE_IN):
            self._refusals[tier] = refusals
            return best
        self._refusals[tier] = 0
        is_flat = self._loads[tier].is_known and not self._loads[tier].tells_apart
        most = max(EXPLORE_BLOCKS, 2 * self._tried.get(tier, 0)) if is_flat else EXPLORE_BLOCKS
        there = run[best : best + most]
        tried = next((place for place, other in enumerate(there) if other != tier), len(there))
        if is_flat:
            self._tried[tier] = tried
        else:
            self._tried.pop(tier, None)
        return best + tried

    def expected_prefill_seconds(self, tokens: int) -> float:
        """What computing so many tokens more adds to a prefill."""
        return tokens * self._prefill.slope if self._prefill.has_samples else math.inf

    def expected_load_seconds(self, tier: str, num_bytes: int) -> float | None:
        """What loading so many bytes takes; None when there is nothing to go by."""
        line = self._loads.get(tier)
        return None if line is None else line.seconds(num_bytes)

    def expected_step_seconds(self, tokens: int) -> float:
        """What a step takes at least that computes so many prompt tokens; 0 when not known."""
        return self._prefill.seconds(tokens) or 0.0 if self._prefill.is_known else 0.0

    def check(self) -> None:
        """Asserts every invariant."""
        for line in (self._prefill, *self._loads.values()):
            assert line.latency >= 0, f"a latency is {line.latency} seconds"
            assert line.slope >= 0, f"a slope is {line.slope}"
        for tier, refusals in self._refusals.items():
            assert refusals < EXPLORE_ONE_IN, f"{tier} was refused {refusals} times and never tried"

    def _best(self, run: Sequence[str], block_bytes: int, block_tokens: int) -> int:
        if not self._prefill.has_samples:
            return len(run)
        best, best_saved, end, saved = 0, 0.0, 0, 0.0
        entered: set[str] = set()
        # The saving grows or falls evenly within a tier, so the best place to stop is an end.
        for tier, blocks in groupby(run):
            count = len(list(blocks))
            end += count
            computing, loading = (
                self.expected_prefill_seconds(count * block_tokens),
                self.expected_load_seconds(tier, count * block_bytes),
            )
            if loading is None:
                saved += computing
            elif self._is_sure_of(tier):
                saved += computing - loading + (self._loads[tier].latency if tier in entered else 0.0)
                entered.add(tier)
            else:
                saved += DOUBT * computing - loading
            if saved >= best_saved:
                best, best_saved = end, saved
        return best

    def _is_sure_of(self, tier: str) -> bool:
        return self._loads[tier].is_known and self._prefill.is_known


def _is_measured(size: float, seconds: float, most_per_second: float) -> bool:
    return size > 0 and size / most_per_second < seconds < _LONGEST_SECONDS
