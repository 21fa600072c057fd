"""The frozen records that flow through the planner: what was seen, what is wanted, what was decided.

Plain numbers only, so that a decision can be written as one JSON line and made again from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

STARTING, READY, DRAINING, DOWN = "starting", "ready", "draining", "down"
"""States of an engine as the planner counts it. Starting and ready replicas are supply; the others are
not.
"""


@dataclass(frozen=True)
class Delta:
    """Growth of one histogram between two scrapes: total seconds and number of samples."""

    sum_seconds: float
    count: float

    @property
    def mean_seconds(self) -> float | None:
        return self.sum_seconds / self.count if self.count > 0 else None


@dataclass(frozen=True)
class EngineObservation:
    """One engine at one tick. `None` means unknown, never zero. `stale_reason` is empty when the numbers
    are fresh.

    Token numbers and histograms without `_total` cover the last `interval_seconds`; `kv_usage` is 0..1.
    """

    url: str
    state: str
    stale_reason: str = ""
    age_seconds: float = 0.0
    interval_seconds: float = 0.0
    restarted: bool = False
    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    prompt_tokens_total: float | None = None
    generation_tokens_total: float | None = None
    prompt_tokens: float | None = None
    generation_tokens: float | None = None
    ttft: Delta | None = None
    itl: Delta | None = None
    queue_wait: Delta | None = None

    @property
    def stale(self) -> bool:
        return self.stale_reason != ""

    @property
    def usable(self) -> bool:
        return self.state == READY and not self.stale


@dataclass(frozen=True)
class ProxyObservation:
    """The proxy's own count over the last `interval_seconds`; `None` on the first look or after a restart."""

    stale_reason: str = ""
    interval_seconds: float = 0.0
    arrivals: float | None = None
    prompt_tokens: float | None = None
    in_flight: int = 0


@dataclass(frozen=True)
class FleetObservation:
    """All engines known at one tick, and the proxy if there is one."""

    time_seconds: float
    engines: tuple[EngineObservation, ...] = ()
    proxy: ProxyObservation | None = None
    is_complete: bool = True
    """False while the proxy, which knows the fleet, has never been read: there may be engines nobody has named."""

    @property
    def current(self) -> int:
        """Replicas that are, or will soon be, able to serve."""
        return sum(engine.state in (STARTING, READY) for engine in self.engines)


@dataclass(frozen=True)
class SizingPolicy:
    """What the operator asked for. `target` is `load` or `sla`."""

    target: str = "load"
    min_replicas: int = 1
    max_replicas: int = 8
    ttft_seconds: float | None = None
    itl_seconds: float | None = None
    attainment: float = 0.95
    stabilisation_seconds: float = 300.0
    warmup_seconds: float = 30.0
    max_kv_usage: float = 0.8
    max_waiting_per_replica: float = 4.0
    max_running_per_replica: float | None = None
    down_margin: float = 0.75
    """A replica is given up only if the rest would stay below this share of every threshold."""


@dataclass(frozen=True)
class LineStats:
    """Weighted sums of a least-squares line y = a + b*x with forgetting; enough to refit without the
    samples.
    """

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0


@dataclass(frozen=True)
class Memory:
    """All that one decision hands to the next.

    `needs` holds (time, replicas needed with margin) inside the stabilisation window and `since_seconds`
    is when the
    window began to fill; `prefill` is seconds over prompt tokens, `decode` is ITL seconds over batch.
    """

    since_seconds: float | None = None
    needs: tuple[tuple[float, int], ...] = ()
    prefill: LineStats = field(default_factory=LineStats)
    decode: LineStats = field(default_factory=LineStats)
    arrival_rate: float | None = None


@dataclass(frozen=True)
class DecisionInputs:
    """Everything a decision depends on. `order` is a manual replica count, or None."""

    observation: FleetObservation
    policy: SizingPolicy
    memory: Memory
    order: int | None = None


@dataclass(frozen=True)
class Decision:
    """What to do, why, and from what. `reason` is one short word; `explanation` one sentence with the
    numbers.
    """

    current: int
    desired: int
    reason: str
    explanation: str
    need_up: int
    need_down: int
    inputs: DecisionInputs
    memory: Memory

    @property
    def direction(self) -> str:
        return "up" if self.desired > self.current else "down" if self.desired < self.current else "hold"
