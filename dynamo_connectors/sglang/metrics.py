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

_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class _Families(NamedTuple):
    wanted: Counter
    hit: Counter
    offloaded: Counter
    recovered: Counter
    dropped: Counter
    failed: Counter
    object_failures: Counter
    object_circuits: Counter
    onboarded_bytes: Counter
    offloaded_bytes: Counter
    seconds: Histogram
    used: Gauge


@cache
def _families(registry: CollectorRegistry) -> _Families:
    """Once per registry: a backend may be attached, detached and attached again. Same names as under vLLM."""

    def counter(name: str, text: str, *labels: str) -> Counter:
        return Counter(f"dynamo_kvbm_{name}", text, labels, registry=registry)

    return _Families(
        wanted=counter("wanted_blocks", "Blocks of prompts that SGLang's own levels did not hold."),
        hit=counter("hit_blocks", "Blocks given to requests, by the tier they came from.", "tier"),
        offloaded=counter("offloaded_blocks", "Blocks that arrived in a tier from above.", "tier"),
        recovered=counter("recovered_blocks", "Blocks of an earlier run, found at start.", "tier"),
        dropped=counter("dropped_blocks", "Blocks that were not kept, or no longer are.", "reason"),
        failed=counter("load_failures", "Blocks that gave no bytes; the engine recomputed them.", "reason"),
        object_failures=counter("object_failures", "What an object store refused, lost or got wrong.", "reason"),
        object_circuits=counter("object_circuits_opened", "Times a failing object store was left alone."),
        onboarded_bytes=counter("onboarded_bytes", "Bytes copied from a tier to SGLang's host memory.", "tier"),
        offloaded_bytes=counter("offloaded_bytes", "Bytes copied down into a tier.", "tier"),
        seconds=Histogram(
            "dynamo_kvbm_transfer_seconds",
            "How long copies between tiers took, by what they did and the tier they read or wrote.",
            ["what", "tier"],
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
        """Totals of one store never run backwards; two threads may report theirs in any order.

        Lookups, hits and use are those of the main pool: the pages of the others belong to the same blocks.
        """
        families, where = self._families, (str(counts.store), pool, tier)
        with self._lock:
            if pool == MAIN_POOL:
                self._advance(families.wanted, (*where, "wanted"), (), counts.asked_pages)
                self._advance(families.hit, (*where, "hit"), (tier,), counts.read_pages)
                self._advance(families.recovered, (*where, "recovered"), (tier,), counts.recovered_pages)
                self._advance(families.offloaded, (*where, "offloaded"), (tier,), counts.written_pages)
            self._advance(families.dropped, (*where, "dropped"), ("evicted",), counts.evicted_pages)
            for reason, total in counts.dropped.items():
                self._advance(families.dropped, (*where, "dropped"), (reason,), total)
            for reason, total in counts.load_failures.items():
                self._advance(families.failed, (*where, "failed"), (reason,), total)
            for reason, total in counts.store_failures.items():
                self._advance(families.object_failures, (*where, "object"), (reason,), total)
            self._advance(families.object_circuits, (*where, "circuits"), (), counts.circuits_opened)
        if pool == MAIN_POOL and counts.capacity_pages:
            families.used.labels(tier).set(100 * counts.ready_pages / counts.capacity_pages)

    def observe(self, transfer: Transfer) -> None:
        families = self._families
        num_bytes = families.onboarded_bytes if transfer.is_read else families.offloaded_bytes
        num_bytes.labels(transfer.tier).inc(transfer.num_bytes)
        what = "onboard" if transfer.is_read else "offload"
        families.seconds.labels(what, transfer.tier).observe(transfer.seconds)

    def check(self) -> None:
        with self._lock:
            assert all(total > 0 for total in self._seen.values()), "a counter ran backwards"

    def _advance(self, counter: Counter, what: tuple[str, ...], labels: tuple[str, ...], total: int) -> None:
        seen = self._seen[what + labels]
        if total > seen:
            (counter.labels(*labels) if labels else counter).inc(total - seen)
            self._seen[what + labels] = total
