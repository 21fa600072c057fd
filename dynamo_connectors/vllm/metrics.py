"""Counts that reach vLLM's own /metrics page, and its periodic log line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter as PromCounter
from prometheus_client import Gauge as PromGauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from dynamo_connectors.tiers.index import IndexStats

#: Count -> (metric name, label, help).
_COUNTERS = {
    "hit_blocks": ("dynamo_kvbm_hit_blocks", "tier", "Blocks given to requests, by the tier they came from."),
    "offloaded_blocks": ("dynamo_kvbm_offloaded_blocks", "tier", "Blocks that arrived in a tier."),
    "dropped_blocks": ("dynamo_kvbm_dropped_blocks", "reason", "Blocks that were not kept, or no longer are."),
    "load_failures": ("dynamo_kvbm_load_failures", "reason", "Blocks that gave no bytes; the engine recomputed them."),
    "onboarded_bytes": ("dynamo_kvbm_onboarded_bytes", None, "Bytes copied up to HBM."),
    "offloaded_bytes": ("dynamo_kvbm_offloaded_bytes", None, "Bytes copied from HBM to host memory."),
    "spilled_bytes": ("dynamo_kvbm_spilled_bytes", None, "Bytes written to disk."),
}


class KvbmStats(KVConnectorStats):
    """`data["counts"]` maps "what|label" to an amount; `data["used"]` maps a tier to its used share, 0 to 1."""

    data: dict[str, Any]

    @classmethod
    def of(cls, counts: Mapping[tuple[str, str], int], tiers: Mapping[str, IndexStats] | None = None) -> KvbmStats:
        data: dict[str, Any] = {"counts": {"|".join(key): amount for key, amount in counts.items() if amount}}
        if tiers is not None:
            data["used"] = {name: stats.ready_blocks / stats.capacity_blocks for name, stats in tiers.items()}
        return cls(data=data)

    def reset(self) -> None:
        self.data = {"counts": {}}

    def aggregate(self, other: KVConnectorStats) -> KvbmStats:
        counts: Counter[str] = Counter(self.data.get("counts", {}))
        counts.update(other.data.get("counts", {}))
        used = {**self.data.get("used", {}), **other.data.get("used", {})}
        return KvbmStats(data={"counts": dict(counts), "used": used})

    def reduce(self) -> dict[str, int | float]:
        shares = {f"{tier} used": round(share, 3) for tier, share in self.data.get("used", {}).items()}
        return {**self.data.get("counts", {}), **shares}

    def is_empty(self) -> bool:
        return not self.data.get("counts")


class KvbmPromMetrics(KVConnectorPromMetrics):
    """Registers with the metric classes that vLLM passes in, so that several API servers share one page."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter, gauge = metric_types[PromCounter], metric_types[PromGauge]
        self._counters = {
            what: counter(name=name, documentation=text, labelnames=[*labelnames, *([label] if label else [])])
            for what, (name, label, text) in _COUNTERS.items()
        }
        self._used = gauge(
            name="dynamo_kvbm_memory_utilization_percent",
            documentation="Used share of a tier, 0 to 100.",
            # Each API server hears of some steps only: by default each would keep a series of its own.
            multiprocess_mode="mostrecent",
            labelnames=[*labelnames, "tier"],
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for key, amount in transfer_stats_data.get("counts", {}).items():
            what, label = key.split("|", 1)
            labels = [*engine, label] if _COUNTERS[what][1] else engine
            self._counters[what].labels(*labels).inc(amount)
        for tier, share in transfer_stats_data.get("used", {}).items():
            self._used.labels(*engine, tier).set(100 * share)
