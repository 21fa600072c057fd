"""Counts that reach vLLM's own /metrics page, and its periodic log line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import Counter as PromCounter
from prometheus_client import Gauge as PromGauge
from prometheus_client import Histogram as PromHistogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from dynamo_connectors.tiers.index_stats import IndexStats
from dynamo_connectors.transport.metric_names import NIXL_COUNTERS, NIXL_LEVELS, in_base_units

#: Count -> (metric name, label, help).
_COUNTERS: dict[str, tuple[str, str | None, str]] = {
    "wanted_blocks": ("dynamo_kvbm_wanted_blocks", None, "Blocks of admitted prompts that HBM did not hold."),
    "hit_blocks": ("dynamo_kvbm_hit_blocks", "tier", "Blocks given to requests, by the tier they came from."),
    "offloaded_blocks": ("dynamo_kvbm_offloaded_blocks", "tier", "Blocks that arrived in a tier from above."),
    "prefetched_blocks": ("dynamo_kvbm_prefetched_blocks", "tier", "Blocks that arrived in a tier from below."),
    "recovered_blocks": ("dynamo_kvbm_recovered_blocks", "tier", "Blocks of an earlier run, found at start."),
    "dropped_blocks": ("dynamo_kvbm_dropped_blocks", "reason", "Blocks that were not kept, or no longer are."),
    "load_failures": ("dynamo_kvbm_load_failures", "reason", "Blocks that gave no bytes; the engine recomputed them."),
    "move_failures": ("dynamo_kvbm_move_failures", "reason", "Blocks that were not copied between two tiers."),
    "object_failures": ("dynamo_kvbm_object_failures", "reason", "What an object store refused, lost or got wrong."),
    "object_circuits": ("dynamo_kvbm_object_circuits_opened", None, "Times a failing object store was left alone."),
    "refused_blocks": ("dynamo_kvbm_gate_refused_blocks", None, "Blocks computed again because that is faster."),
    "shared_loads": ("dynamo_kvbm_shared_loads", None, "Requests that waited for another request's load."),
    "early_requests": ("dynamo_kvbm_early_requests", None, "Requests that came before a store had told what it holds."),
    **NIXL_COUNTERS,
    "nixl_unexported_blocks": (
        "dynamo_nixl_unexported_blocks",
        None,
        "Blocks not handed over because leases hold their share of host memory.",
    ),
    "nixl_peer_hints": ("dynamo_nixl_peer_hints", None, "Requests that named a peer which holds their prefix."),
    "ignored_hints": ("dynamo_kvbm_ignored_hints", None, "Hints in kv_transfer_params that made no sense."),
}
#: What a transfer does -> (metric name, help). Labelled with the tier it reads (up) or writes (down).
_BYTES = {
    "onboard": ("dynamo_kvbm_onboarded_bytes", "Bytes copied from a tier to HBM."),
    "offload": ("dynamo_kvbm_offloaded_bytes", "Bytes copied down into a tier."),
    "prefetch": ("dynamo_kvbm_prefetched_bytes", "Bytes copied from a tier to host memory, before they are asked for."),
}
_SECONDS_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

#: (what, tier) -> bytes and seconds of each transfer.
Transfers = Mapping[tuple[str, str], Sequence[tuple[int, float]]]


class KvbmStats(KVConnectorStats):
    """Keys of `data`, each of them optional and a dict whose keys are "what|label":

    counts: amounts to add. transfers: lists of [bytes, seconds]. used: share of a tier, 0 to 1. pinned: blocks there.
    levels: see `NIXL_LEVELS`.
    """

    data: dict[str, Any]

    @classmethod
    def of_scheduler(
        cls, counts: Mapping[tuple[str, str], int], tiers: Mapping[str, IndexStats] | None = None
    ) -> KvbmStats:
        data: dict[str, Any] = {"counts": _named(counts)}
        if tiers is not None:
            data["used"] = {name: stats.ready_blocks / stats.capacity_blocks for name, stats in tiers.items()}
            data["pinned"] = {name: stats.pinned_blocks for name, stats in tiers.items()}
        return cls(data=data)

    @classmethod
    def of_worker(
        cls, transfers: Transfers, counts: Mapping[tuple[str, str], int], levels: Mapping[str, int] | None = None
    ) -> KvbmStats:
        moved = {"|".join(key): [list(one) for one in all_] for key, all_ in transfers.items()}
        return cls(data={"transfers": moved, "counts": _named(counts), "levels": dict(levels or {})})

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KvbmStats:
        counts: Counter[str] = Counter(self.data.get("counts", {}))
        counts.update(other.data.get("counts", {}))
        transfers = {key: list(moved) for key, moved in self.data.get("transfers", {}).items()}
        for key, moved in other.data.get("transfers", {}).items():
            transfers.setdefault(key, []).extend(moved)
        latest = {what: {**self.data.get(what, {}), **other.data.get(what, {})} for what in ("used", "pinned")}
        levels: Counter[str] = Counter(self.data.get("levels", {}))
        levels.update(other.data.get("levels", {}))
        return KvbmStats(data={"counts": dict(counts), "transfers": transfers, "levels": dict(levels), **latest})

    def reduce(self) -> dict[str, int | float]:
        moved = {f"{key} bytes": sum(one[0] for one in all_) for key, all_ in self.data.get("transfers", {}).items()}
        shares = {f"{tier} used": round(share, 3) for tier, share in self.data.get("used", {}).items()}
        return {**self.data.get("counts", {}), **moved, **shares}

    def is_empty(self) -> bool:
        return not any(self.data.values())


def _named(counts: Mapping[tuple[str, str], int]) -> dict[str, int]:
    return {"|".join(key): amount for key, amount in counts.items() if amount}


class KvbmPromMetrics(KVConnectorPromMetrics):
    """Registers with the metric classes that vLLM passes in, so that several API servers share one page."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter, gauge = metric_types[PromCounter], metric_types[PromGauge]
        self._counters = {
            what: counter(name=name, documentation=text, labelnames=[*labelnames, *([label] if label else [])])
            for what, (name, label, text) in _COUNTERS.items()
        }
        self._bytes = {
            what: counter(name=name, documentation=text, labelnames=[*labelnames, "tier"])
            for what, (name, text) in _BYTES.items()
        }
        self._seconds = metric_types[PromHistogram](
            name="dynamo_kvbm_transfer_seconds",
            documentation="How long copies between tiers took, by what they did and the tier they read or wrote.",
            buckets=_SECONDS_BUCKETS,
            labelnames=[*labelnames, "what", "tier"],
        )
        # Each API server hears of some steps only: by default each would keep a series of its own.
        latest = {"multiprocess_mode": "mostrecent", "labelnames": [*labelnames, "tier"]}
        self._used = gauge(
            name="dynamo_kvbm_memory_utilization_percent", documentation="Used share of a tier, 0 to 100.", **latest
        )
        self._pinned = gauge(
            name="dynamo_kvbm_pinned_blocks", documentation="Blocks that are read, moved or pinned.", **latest
        )
        self._levels = {
            what: gauge(name=name, documentation=text, multiprocess_mode="mostrecent", labelnames=labelnames)
            for what, (name, text) in NIXL_LEVELS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for key, amount in transfer_stats_data.get("counts", {}).items():
            what, label = key.split("|", 1)
            labels = [*engine, label] if _COUNTERS[what][1] else engine
            self._counters[what].labels(*labels).inc(in_base_units(what, amount))
        for key, transfers in transfer_stats_data.get("transfers", {}).items():
            what, tier = key.split("|", 1)
            for num_bytes, seconds in transfers:
                self._bytes[what].labels(*engine, tier).inc(num_bytes)
                self._seconds.labels(*engine, what, tier).observe(seconds)
        for tier, share in transfer_stats_data.get("used", {}).items():
            self._used.labels(*engine, tier).set(100 * share)
        for tier, blocks in transfer_stats_data.get("pinned", {}).items():
            self._pinned.labels(*engine, tier).set(blocks)
        for what, level in transfer_stats_data.get("levels", {}).items():
            self._levels[what].labels(*engine).set(level)
