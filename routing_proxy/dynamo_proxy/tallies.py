"""What every request touches of the metrics, in plain numbers: a labelled counter of the client library costs a request
several microseconds. metrics.py dresses them for Prometheus when it is asked.
"""

from __future__ import annotations

from bisect import bisect_left

SECONDS: tuple[float, ...] = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Durations:
    """A histogram of seconds, or of another unit with other bounds."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """As the client library wants them: cumulative counts by bound, and the sum."""
        total, buckets = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append((str(float(bound)) if bound != float("inf") else "+Inf", float(total)))
        return buckets, self._sum


class Tallies:
    """The counts and durations of one proxy's requests."""

    def __init__(self) -> None:
        self.arrivals = 0
        self.prompt_bytes = 0
        self.prompt_tokens = 0
        self.matched_tokens = 0
        self.requests: dict[tuple[str, int, str], int] = {}  # by endpoint, status and reason
        self.decisions: dict[tuple[str, str], int] = {}  # by mode and reason
        self.ttft = Durations()
        self.duration = Durations()

    def arrived(self, body_bytes: int) -> None:
        """A request that wants an engine is complete."""
        self.arrivals += 1
        self.prompt_bytes += body_bytes

    def decided(self, mode: str, reason: str) -> None:
        """A request was placed, for this reason."""
        chosen = mode, reason
        self.decisions[chosen] = self.decisions.get(chosen, 0) + 1

    def routed(self, prompt_tokens: int, matched_tokens: int) -> None:
        """A request was placed for the first time (retries do not count its tokens again)."""
        self.prompt_tokens += prompt_tokens
        self.matched_tokens += min(matched_tokens, prompt_tokens)

    def finished(self, endpoint: str, status: int, reason: str, seconds: float) -> None:
        ended = endpoint, status, reason
        self.requests[ended] = self.requests.get(ended, 0) + 1
        self.duration.observe(seconds)

    def check(self) -> None:
        assert 0 <= self.matched_tokens <= self.prompt_tokens, "more tokens matched than routed"
