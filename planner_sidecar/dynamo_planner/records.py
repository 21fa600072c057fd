"""The frozen records that flow through the planner: what was seen, what is wanted, what was decided.

Plain numbers only, so that a decision can be written as one JSON line and made again from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .forecast import ForecastState
from .step_model import StepModel

STARTING, READY, DRAINING, DOWN = "starting", "ready", "draining", "down"
"""States of an engine as the planner counts it. Starting and ready replicas are supply; the others are
not.
"""


@dataclass(frozen=True)
class Delta:
    """Growth of one histogram between two scrapes: total seconds, number of samples, and how many of them were within
    the target (None: no target, or no buckets).
    """

    sum_seconds: float
    count: float
    within: float | None = None

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
    matched_tokens: float | None = None
    """Prompt tokens that the routed engines already held: the prefix hits."""
    in_flight: int = 0


@dataclass(frozen=True)
class FleetObservation:
    """All engines known at one tick, and the proxy if there is one."""

    time_seconds: float
    engines: tuple[EngineObservation, ...] = ()
    proxy: ProxyObservation | None = None
    is_complete: bool = True
    """False while the proxy has never been read, or the cluster cannot be: there may be engines nobody has named."""
    wall_seconds: float | None = None
    """Seconds since midnight UTC of some day: the daily profile's clock. None: `time_seconds` stands in."""
    startups: tuple[float, ...] = ()
    """How long replicas took that became ready since the last look, where the actuator knows."""
    is_edited: bool = False
    """Somebody else has changed the count: their wish, to be kept for a whole window."""
    ordered: int | None = None
    """Replicas that are ordered, come or not, where the actuator knows: they hold their share of the budget."""

    @property
    def current(self) -> int:
        """Replicas that are, or will soon be, able to serve."""
        return sum(engine.state in (STARTING, READY) for engine in self.engines)


@dataclass(frozen=True)
class SizingPolicy:
    """What the operator asked for. `target` is `load` or `sla`; `role` is what the pool's engines do."""

    target: str = "load"
    role: str = "aggregated"
    min_replicas: int = 1
    max_replicas: int = 8
    gpus_per_replica: int = 1
    ttft_seconds: float | None = None
    itl_seconds: float | None = None
    attainment: float = 0.95
    stabilisation_seconds: float = 300.0
    warmup_seconds: float = 30.0
    startup_seconds: float = 60.0
    """How long a replica takes to become ready, until that has been seen."""
    interval_seconds: float = 10.0
    max_kv_usage: float = 0.8
    max_waiting_per_replica: float = 4.0
    max_running_per_replica: float | None = None
    down_margin: float = 0.75
    """A replica is given up only if the rest would stay below this share of every threshold."""
    max_down_share: float = 0.5
    """At most this share of the replicas, rounded up, is given up in `down_period_seconds`: what the model says of
    twice the load is seen before it is followed further.
    """
    down_period_seconds: float = 60.0
    idle_to_zero_seconds: float | None = None
    """Nothing asked for this long: stop all. None: never."""
    is_pooled: bool = False
    """The router sends a request to where the queue is shortest, so that the pool waits like one queue."""
    prompt_cv2: float = 1.6
    """Squared coefficient of variation of prompt lengths; 1.6 is that of production."""
    has_daily_profile: bool = True
    burst_factor: float = 1.0
    """A step to so many times the usual load finds room, so that none waits until help has come. 1: off."""


@dataclass(frozen=True)
class Memory:
    """All that one decision hands to the next.

    `needs` holds (time, replicas needed with margin) inside the stabilisation window and `since_seconds`
    is when the window began to fill; `prefill` is seconds over (1, prompt tokens), `decode` is ITL seconds over
    (1, batch, KV use).
    """

    since_seconds: float | None = None
    needs: tuple[tuple[float, int], ...] = ()
    prefill: StepModel = field(default_factory=StepModel)
    decode: StepModel = field(default_factory=StepModel)
    forecast: ForecastState = field(default_factory=ForecastState)
    arrival_rate: float | None = None
    prompt_tokens: float | None = None
    """Mean prompt tokens to compute per request: what the proxy found cached is not counted."""
    output_tokens: float | None = None
    """Mean generated tokens per request."""
    kv_per_request: float | None = None
    """Share of one replica's KV that a running request holds."""
    correction: float = 1.0
    """Slow factor on the modelled prefill time: what was observed against what the model had promised."""
    starting: tuple[tuple[str, float], ...] = ()
    startups: tuple[float, ...] = ()
    """Seconds from the first sight of a starting replica to its being ready: the last few."""
    last_count: int | None = None
    last_down_seconds: float | None = None
    """When the count was last seen to fall."""
    last_asked_seconds: float | None = None
    usual_rate: float | None = None
    """Requests per second that half of the time is passed, `usual_seconds` of it: what a burst is a multiple of."""
    usual_seconds: float = 0.0
    pending: float | None = None
    """Requests that wait for this pool, here or upstream; `pending_growth` of them more every second."""
    pending_growth: float = 0.0


@dataclass(frozen=True)
class DecisionInputs:
    """Everything a decision depends on. `order` is a manual replica count, `ceiling` what the shared GPU budget
    leaves to this pool; None means that there is none.
    """

    observation: FleetObservation
    policy: SizingPolicy
    memory: Memory
    order: int | None = None
    ceiling: int | None = None


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
