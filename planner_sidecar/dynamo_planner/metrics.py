"""The planner's own Prometheus metrics, in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .records import Decision


class PlannerMetrics:
    """Counters and gauges under `dynamo_planner_`; every counter that can hide a failure has a reason."""

    def __init__(self, mode: str) -> None:
        self.registry = CollectorRegistry()
        self._mode = mode
        self._last: tuple[int, int] | None = None
        self._events = Counter(
            "dynamo_planner_scaling_events",
            "Changes of the replica count that were ordered, or advised in advisory mode.",
            ("mode", "direction", "reason"),
            registry=self.registry,
        )
        self._desired = Gauge("dynamo_planner_desired_replicas", "Replicas wanted.", registry=self.registry)
        self._current = Gauge("dynamo_planner_current_replicas", "Replicas there or starting.", registry=self.registry)
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
            "Time from the first look to the end of the order.",
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
            registry=self.registry,
        )

    def decided(self, decision: Decision, accepted: bool) -> None:
        """Count a decision. An advised change counts once, however many ticks repeat it."""
        self._current.set(decision.current)
        self._desired.set(decision.desired)
        pair = decision.current, decision.desired
        advised_anew = self._mode == "advisory" and pair != self._last
        self._last = pair
        if decision.direction != "hold" and (accepted or advised_anew):
            self._events.labels(self._mode, decision.direction, decision.reason).inc()

    def observation_failed(self, reason: str) -> None:
        self._failures.labels(reason).inc()

    def actuation_failed(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def ticked(self, seconds: float) -> None:
        self._ticks.observe(seconds)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)

    def value(self, name: str, **labels: str) -> float:
        """One sample, 0 if it was never counted."""
        return self.registry.get_sample_value(name, labels) or 0.0
