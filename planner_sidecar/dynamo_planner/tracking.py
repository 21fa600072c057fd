"""Turns consecutive readings of one engine, or of the proxy, into observations: deltas, restarts, staleness.

No I/O and no clock: time is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ObservationError
from .exposition import EngineReading, Histogram
from .records import DOWN, READY, Delta, EngineObservation, ProxyObservation


def _growth(new: float | None, old: float | None) -> float | None:
    return None if new is None or old is None else new - old


def _histogram_growth(new: Histogram | None, old: Histogram | None, target_seconds: float | None) -> Delta | None:
    if new is None or old is None:
        return None
    count = new.count - old.count
    return Delta(max(0.0, new.sum_seconds - old.sum_seconds), count, _within(new, old, count, target_seconds))


def _within(new: Histogram, old: Histogram, count: float, target_seconds: float | None) -> float | None:
    """Samples of the growth within the target: the cumulative count there, on a line between the edges around it."""
    if target_seconds is None or not new.buckets or [e for e, _ in new.buckets] != [e for e, _ in old.buckets]:
        return None
    low_edge = low = 0.0
    for (edge, now), (_, before) in zip(new.buckets, old.buckets, strict=True):
        grown = min(max(0.0, now - before), count)
        if edge >= target_seconds:
            share = (target_seconds - low_edge) / (edge - low_edge)
            return low + share * max(0.0, grown - low)
        low_edge, low = edge, grown
    return low  # beyond the last edge nobody knows; they count as late


@dataclass(frozen=True)
class Targets:
    """What first tokens and gaps between tokens are held against, in seconds; None: nothing."""

    ttft_seconds: float | None = None
    itl_seconds: float | None = None


def _count(histogram: Histogram | None) -> float | None:
    return None if histogram is None else histogram.count


NO_TARGETS = Targets()
Totals = tuple[float, float, float]


class EngineTracker:
    """Remembers the last good reading of one engine. `frozen_seconds` and `down_seconds` bound patience."""

    def __init__(
        self,
        url: str,
        now: float,
        frozen_seconds: float = 60.0,
        down_seconds: float = 60.0,
        targets: Targets = NO_TARGETS,
    ) -> None:
        self.url = url
        self._targets = targets
        self.first_good: float | None = None
        self._frozen_seconds = frozen_seconds
        self._down_seconds = down_seconds
        self._last: EngineReading | None = None
        self._last_good = now
        self._last_alive = now
        self._moved = now

    def failed(self, error: ObservationError, now: float) -> EngineObservation:
        """The engine could not be read. After `down_seconds` without any answer it no longer counts as
        supply;
        one that answers, but not with metrics, is alive and does count.
        """
        if error.reason not in ("unreachable", "timeout"):
            self._last_alive = now
        state = DOWN if now - self._last_alive >= self._down_seconds else READY
        return EngineObservation(self.url, state, stale_reason=error.reason, age_seconds=self._age(now))

    def read(self, reading: EngineReading, now: float) -> EngineObservation:
        """Fold one good reading in. Deltas are None on the first reading and across an engine's restart."""
        old, restarted = self._last, self._restarted(reading)
        interval = now - self._last_good if old is not None and not restarted else 0.0
        if restarted or self.first_good is None:
            self.first_good = now
        base = None if restarted or interval <= 0 else old
        if base is None or self._progress(base) != self._progress(reading) or reading.running + reading.waiting == 0:
            self._moved = now
        self._last, self._last_good, self._last_alive = reading, now, now
        frozen = now - self._moved >= self._frozen_seconds
        return EngineObservation(
            self.url,
            READY,
            stale_reason="frozen" if frozen else "",
            age_seconds=self._age(now),
            interval_seconds=interval,
            restarted=restarted,
            running=reading.running,
            waiting=reading.waiting,
            kv_usage=reading.kv_usage,
            prompt_tokens_total=reading.prompt_tokens_total,
            generation_tokens_total=reading.generation_tokens_total,
            prompt_tokens=_growth(reading.prompt_tokens_total, base.prompt_tokens_total if base else None),
            generation_tokens=_growth(reading.generation_tokens_total, base.generation_tokens_total if base else None),
            ttft=_histogram_growth(reading.ttft, base.ttft if base else None, self._targets.ttft_seconds),
            itl=_histogram_growth(reading.itl, base.itl if base else None, self._targets.itl_seconds),
            queue_wait=_histogram_growth(reading.queue_wait, base.queue_wait if base else None, None),
        )

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        assert (self._last is None) == (self.first_good is None), "a reading and its first time go together"
        assert self.first_good is None or self.first_good <= self._last_good, "first good reading after the last"
        assert self._last is None or self._moved <= self._last_good, "progress seen after the last reading"

    def _age(self, now: float) -> float:
        return 0.0 if self.first_good is None else now - self.first_good

    @staticmethod
    def _progress(reading: EngineReading) -> tuple[float | None, float | None]:
        return reading.prompt_tokens_total, reading.generation_tokens_total

    def _restarted(self, new: EngineReading) -> bool:
        old = self._last
        if old is None:
            return False
        if new.started_seconds and old.started_seconds and new.started_seconds > old.started_seconds + 0.5:
            return True
        pairs = (
            (new.prompt_tokens_total, old.prompt_tokens_total),
            (new.generation_tokens_total, old.generation_tokens_total),
            (_count(new.ttft), _count(old.ttft)),
            (_count(new.itl), _count(old.itl)),
            (_count(new.queue_wait), _count(old.queue_wait)),
        )
        return any(a is not None and b is not None and a < b for a, b in pairs)


class ProxyTracker:
    """Remembers the proxy's last totals: arrivals, prompt tokens, and those of them that were found cached."""

    def __init__(self) -> None:
        self._last: tuple[float, Totals] | None = None

    def failed(self, error: ObservationError) -> ProxyObservation:
        return ProxyObservation(stale_reason=error.reason)

    def read(self, totals: Totals, in_flight: int, now: float) -> ProxyObservation:
        """Fold one answer in; totals that fell mean that the proxy restarted, and give no delta."""
        old, self._last = self._last, (now, totals)
        if old is None or now <= old[0] or any(a < b for a, b in zip(totals, old[1], strict=True)):
            return ProxyObservation(in_flight=in_flight)
        grown = [a - b for a, b in zip(totals, old[1], strict=True)]
        return ProxyObservation(
            interval_seconds=now - old[0],
            arrivals=grown[0],
            prompt_tokens=grown[1],
            matched_tokens=grown[2],
            in_flight=in_flight,
        )

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        assert self._last is None or min(self._last[1]) >= 0, "the proxy's totals are negative"
