"""Counters of the nvme_ssd tier, in the registry that SGLang's own /metrics shows (`--enable-metrics`)."""

from __future__ import annotations

import threading
from collections import Counter as Totals
from functools import cache
from typing import NamedTuple

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from dynamo_connectors.sglang.page_store import PageCounts


class _Families(NamedTuple):
    read: Counter
    written: Counter
    evicted: Counter
    dropped: Counter
    fill: Gauge


@cache
def _families(registry: CollectorRegistry) -> _Families:
    """Once per registry: a backend may be attached, detached and attached again."""
    tier = ["tier"]
    return _Families(
        read=Counter("dynamo_kvbm_onboarded_blocks", "Blocks read back from a tier.", tier, registry=registry),
        written=Counter("dynamo_kvbm_offloaded_blocks", "Blocks written to a tier.", tier, registry=registry),
        evicted=Counter("dynamo_kvbm_evicted_blocks", "Blocks evicted to make room.", tier, registry=registry),
        dropped=Counter(
            "dynamo_kvbm_dropped_blocks",
            "Blocks that were not kept, or kept and found damaged.",
            ["tier", "reason"],
            registry=registry,
        ),
        fill=Gauge(
            "dynamo_kvbm_memory_utilization_percent",
            "Share of a tier that holds readable blocks.",
            tier,
            registry=registry,
            multiprocess_mode="livemax",
        ),
    )


class StorageMeter:
    """Turns the totals of one store into increments of the process-wide counters."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._families = _families(registry)
        self._lock = threading.Lock()
        self._seen: Totals[str] = Totals()

    def record(self, tier: str, counts: PageCounts) -> None:
        """`counts` never runs backwards; two threads may report the same totals in any order."""
        families = self._families
        with self._lock:
            self._advance(families.read.labels(tier), "read", counts.read_pages)
            self._advance(families.written.labels(tier), "written", counts.written_pages)
            self._advance(families.evicted.labels(tier), "evicted", counts.evicted_pages)
            for reason, total in counts.dropped.items():
                self._advance(families.dropped.labels(tier, reason), f"dropped {reason}", total)
        families.fill.labels(tier).set(100 * counts.ready_pages / counts.capacity_pages)

    def check(self) -> None:
        with self._lock:
            assert all(total >= 0 for total in self._seen.values()), "a counter ran backwards"

    def _advance(self, counter: Counter, name: str, total: int) -> None:
        if total > self._seen[name]:
            counter.inc(total - self._seen[name])
            self._seen[name] = total
