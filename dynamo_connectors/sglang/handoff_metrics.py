"""Counters of the hand-off, in the registry that SGLang's /metrics shows (`--enable-metrics`). Names as under vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from dynamo_connectors.transport.metric_names import NIXL_COUNTERS, NIXL_LEVELS, in_base_units


class _Families(NamedTuple):
    counters: dict[str, Counter]
    levels: dict[str, Gauge]


@cache
def _families(registry: CollectorRegistry) -> _Families:
    return _Families(
        {
            what: Counter(name, text, [label] if label else [], registry=registry)
            for what, (name, label, text) in NIXL_COUNTERS.items()
        },
        {
            what: Gauge(name, text, registry=registry, multiprocess_mode="livesum")
            for what, (name, text) in NIXL_LEVELS.items()
        },
    )


class HandoffMeter:
    """Told by the transport's own threads, again and again."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._families = _families(registry)
        self._levels: dict[str, int] = {}

    def add(self, counts: Mapping[tuple[str, str], int]) -> None:
        for (what, label), amount in counts.items():
            counter = self._families.counters[what]
            (counter.labels(label) if NIXL_COUNTERS[what][1] else counter).inc(in_base_units(what, amount))

    def set(self, what: str, level: int) -> None:
        if self._levels.get(what) != level:
            self._levels[what] = level
            self._families.levels[what].set(level)
