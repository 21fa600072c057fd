"""Counters of the nvme_ssd tier, in the registry that SGLang's own /metrics shows (`--enable-metrics`)."""

from __future__ import annotations

import threading
from collections import Counter as Totals
from functools import cache
from typing import NamedTuple

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from dynamo_connectors.sglang.page_store import PageCounts


class _Families(NamedTuple):
    hit: Counter
    offloaded: Counter
    dropped: Counter
    failed: Counter
    used: Gauge


@cache
def _families(registry: CollectorRegistry) -> _Families:
    """Once per registry: a backend may be attached, detached and attached again. Same names as under vLLM."""

    def counter(name: str, text: str, label: str) -> Counter:
        return Counter(f"dynamo_kvbm_{name}", text, [label], registry=registry)

    return _Families(
        hit=counter("hit_blocks", "Blocks given to requests, by the tier they came from.", "tier"),
        offloaded=counter("offloaded_blocks", "Blocks that arrived in a tier.", "tier"),
        dropped=counter("dropped_blocks", "Blocks that were not kept, or no longer are.", "reason"),
        failed=counter("load_failures", "Blocks that gave no bytes; the engine recomputed them.", "reason"),
        used=Gauge(
            "dynamo_kvbm_memory_utilization_percent",
            "Used share of a tier, 0 to 100.",
            ["tier"],
            registry=registry,
            multiprocess_mode="livemax",
        ),
    )


class StorageMeter:
    """Turns the totals of one store into increments of the process-wide counters."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._families = _families(registry)
        self._lock = threading.Lock()
        self._seen: Totals[tuple[str, str]] = Totals()

    def record(self, tier: str, counts: PageCounts) -> None:
        """Totals never run backwards; two threads may report theirs in any order."""
        families = self._families
        with self._lock:
            self._advance(families.hit, "hit", tier, counts.read_pages)
            self._advance(families.offloaded, "offloaded", tier, counts.written_pages)
            self._advance(families.dropped, "dropped", "evicted", counts.evicted_pages)
            for reason, total in counts.dropped.items():
                self._advance(families.dropped, "dropped", reason, total)
            for reason, total in counts.load_failures.items():
                self._advance(families.failed, "failed", reason, total)
        families.used.labels(tier).set(100 * counts.ready_pages / counts.capacity_pages)

    def check(self) -> None:
        with self._lock:
            assert all(total > 0 for total in self._seen.values()), "a counter ran backwards"

    def _advance(self, counter: Counter, what: str, label: str, total: int) -> None:
        seen = self._seen[what, label]
        if total > seen:
            counter.labels(label).inc(total - seen)
            self._seen[what, label] = total
