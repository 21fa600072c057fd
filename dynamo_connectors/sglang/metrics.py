"""Counters of the tiers below SGLang's own, in the registry that SGLang's /metrics shows (`--enable-metrics`)."""

from __future__ import annotations

import threading
from collections import Counter as Totals
from functools import cache
from typing import NamedTuple

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from dynamo_connectors.config import NVME_SSD
from dynamo_connectors.sglang.page_store import PageCounts, Transfer
from dynamo_connectors.sglang.pools import MAIN_POOL

#: From a page in the page cache to an object store at its deadline.
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_READ, _WRITE = "read", "write"


class _Families(NamedTuple):
    asked: Counter
    hit: Counter
    offloaded: Counter
    dropped: Counter
    failed: Counter
    bytes_: Counter
    seconds: Histogram
    used: Gauge


@cache
def _families(registry: CollectorRegistry) -> _Families:
    """Once per registry: a backend may be attached, detached and attached again. Same names as under vLLM."""

    def counter(name: str, text: str, *labels: str) -> Counter:
        return Counter(f"dynamo_kvbm_{name}", text, labels, registry=registry)

    return _Families(
        asked=counter("lookup_blocks", "Blocks that requests looked for; hits divided by this is the hit rate."),
        hit=counter("hit_blocks", "Blocks given to requests, by the tier they came from.", "tier"),
        offloaded=counter("offloaded_blocks", "Blocks that arrived in a tier.", "tier"),
        dropped=counter("dropped_blocks", "Blocks that were not kept, or no longer are.", "reason"),
        failed=counter("load_failures", "Blocks that gave no bytes; the engine recomputed them.", "reason"),
        bytes_=counter("transfer_bytes", "Bytes read from a tier or written to it.", "tier", "direction"),
        seconds=Histogram(
            "dynamo_kvbm_transfer_seconds",
            "How long one batch of blocks took.",
            ["tier", "direction"],
            registry=registry,
            buckets=_SECONDS,
        ),
        used=Gauge(
            "dynamo_kvbm_memory_utilization_percent",
            "Used share of a tier, 0 to 100.",
            ["tier"],
            registry=registry,
            multiprocess_mode="livemax",
        ),
    )


class StorageMeter:
    """Turns the totals of a worker's pools into increments of the process-wide counters."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._families = _families(registry)
        self._lock = threading.Lock()
        self._seen: Totals[tuple[str, ...]] = Totals()

    def record(self, pool: str, counts: PageCounts, tier: str = NVME_SSD) -> None:
        """Totals never run backwards; two threads may report theirs in any order.

        Lookups, hits and use are those of the main pool: the pages of the others belong to the same blocks.
        """
        families = self._families
        with self._lock:
            if pool == MAIN_POOL:
                self._advance(families.asked, (pool, "asked"), (), counts.asked_pages)
                self._advance(families.hit, (pool, "hit"), (tier,), counts.read_pages)
                self._advance(families.offloaded, (pool, "offloaded"), (tier,), counts.written_pages)
            self._advance(families.dropped, (pool, "dropped", tier), ("evicted",), counts.evicted_pages)
            for reason, total in counts.dropped.items():
                self._advance(families.dropped, (pool, "dropped", tier), (reason,), total)
            for reason, total in counts.load_failures.items():
                self._advance(families.failed, (pool, "failed", tier), (reason,), total)
        if pool == MAIN_POOL and counts.capacity_pages:
            families.used.labels(tier).set(100 * counts.ready_pages / counts.capacity_pages)

    def observe(self, transfer: Transfer) -> None:
        labels = (transfer.tier, _READ if transfer.is_read else _WRITE)
        self._families.bytes_.labels(*labels).inc(transfer.num_bytes)
        self._families.seconds.labels(*labels).observe(transfer.seconds)

    def check(self) -> None:
        with self._lock:
            assert all(total > 0 for total in self._seen.values()), "a counter ran backwards"

    def _advance(self, counter: Counter, what: tuple[str, ...], labels: tuple[str, ...], total: int) -> None:
        seen = self._seen[what + labels]
        if total > seen:
            (counter.labels(*labels) if labels else counter).inc(total - seen)
            self._seen[what + labels] = total
