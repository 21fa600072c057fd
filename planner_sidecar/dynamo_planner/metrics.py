"""The planner's own Prometheus metrics, in a registry of their own."""

from __future__ import annotations

from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .history import Sight
from .records import DOWN, Decision


class PlannerMetrics:
    """Counters and gauges under `dynamo_planner_`; every counter that can hide a failure has a reason."""

    def __init__(self, mode: str) -> None:
        self.registry = CollectorRegistry()
        self._mode = mode
        self._last: dict[str, tuple[int, int]] = {}
        self._seen_at: dict[str, float] = {}
        self._events = Counter(
            "dynamo_planner_scaling_events",
            "Changes of the replica count that were ordered, or advised in advisory mode.",
            ("pool", "mode", "direction", "reason"),
            registry=self.registry,
        )
        self._desired = self._gauge("desired_replicas", "Replicas wanted; KEDA or an HPA may act on it.")
        self._current = self._gauge("current_replicas", "Replicas there or starting.")
        self._rate = self._gauge("arrival_rate", "Requests per second now.")
        self._ahead = self._gauge("forecast_rate", "Requests per second at the horizon.", "bound")
        self._horizon = self._gauge("horizon_seconds", "From a decision to its effect, as learnt from start-ups.")
        self._cover = self._gauge("forecast_cover_ratio", "Share of truths at or under the upper forecast.")
        self._attained = self._gauge("attainment_ratio", "Share of the last interval's tokens within their targets.")
        self._correction = self._gauge("prefill_correction_ratio", "Slow factor on the modelled prefill time.")
        self._gpu_seconds = Counter(
            "dynamo_planner_gpu_seconds",
            "GPU seconds that the pool's replicas have held.",
            ("pool",),
            registry=self.registry,
        )
        self._failures = Counter(
            "dynamo_planner_observation_failures",
            "Engines or proxies that could not be read.",
            ("reason",),
            registry=self.registry,
        )
        self._refused = Counter(
            "dynamo_planner_actuation_failures",
            "Orders that were refused or failed on the way.",
            ("reason",),
            registry=self.registry,
        )
        self._ticks = Histogram(
            "dynamo_planner_tick_seconds",
            "Time to decide, act and record.",
            ("pool",),
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
            registry=self.registry,
        )

    def decided(self, pool: str, decision: Decision, accepted: bool) -> None:
        """Count a decision. An advised change counts once, however many ticks repeat it."""
        self._current.labels(pool).set(decision.current)
        pair = decision.current, decision.desired
        advised_anew = self._mode == "advisory" and pair != self._last.get(pool)
        self._last[pool] = pair
        if decision.direction != "hold" and (accepted or advised_anew):
            self._events.labels(pool, self._mode, decision.direction, decision.reason).inc()

    def saw(self, pool: str, seen: Sight, decision: Decision) -> None:
        """Publish what was decided and on what it rested; what is unknown keeps its last value. Advice that rests on
        nothing is not published: without a sample KEDA and an HPA hold.
        """
        if seen.is_blind:
            with suppress(KeyError):
                self._desired.remove(pool)
        else:
            self._desired.labels(pool).set(seen.desired)
        for gauge, value in (
            (self._rate.labels(pool), seen.rate),
            (self._ahead.labels(pool, "lower"), seen.lower),
            (self._ahead.labels(pool, "point"), seen.point),
            (self._ahead.labels(pool, "upper"), seen.upper),
            (self._attained.labels(pool), seen.attained),
        ):
            if value is not None:
                gauge.set(value)
        self._horizon.labels(pool).set(seen.horizon_seconds)
        self._correction.labels(pool).set(decision.memory.correction)
        hits, truths = decision.memory.forecast.hits
        if truths:
            self._cover.labels(pool).set(hits / truths)
        now, before = decision.inputs.observation.time_seconds, self._seen_at.get(pool)
        if before is not None and now > before:
            held = sum(engine.state != DOWN for engine in decision.inputs.observation.engines)
            self._gpu_seconds.labels(pool).inc((now - before) * held * decision.inputs.policy.gpus_per_replica)
        self._seen_at[pool] = now

    def observation_failed(self, reason: str) -> None:
        self._failures.labels(reason).inc()

    def actuation_failed(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def ticked(self, pool: str, seconds: float) -> None:
        self._ticks.labels(pool).observe(seconds)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)

    def value(self, name: str, **labels: str) -> float:
        """One sample, 0 if it was never counted."""
        return self.registry.get_sample_value(name, labels) or 0.0

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"dynamo_planner_{name}", text, ("pool", *labels), registry=self.registry)
