"""One vocabulary on both engines: a metric of the SGLang adapter means what vLLM's of that name means."""

from __future__ import annotations

from types import SimpleNamespace

from prometheus_client import CollectorRegistry
from prometheus_client import Counter as PromCounter
from prometheus_client import Gauge as PromGauge
from prometheus_client import Histogram as PromHistogram

from dynamo_connectors.sglang.handoff_metrics import HandoffMeter
from dynamo_connectors.sglang.metrics import StorageMeter
from dynamo_connectors.vllm.metrics import KvbmPromMetrics


def labels_by_name(registry: CollectorRegistry) -> dict[str, tuple[str, ...]]:
    return {name: collector._labelnames for name, collector in registry._names_to_collectors.items()}  # type: ignore[attr-defined]


def test_each_metric_has_the_name_and_the_labels_of_vllms() -> None:
    ours, vllms = CollectorRegistry(), CollectorRegistry()
    StorageMeter(ours).check()
    HandoffMeter(ours)

    def kind(of: type) -> object:
        def make(**settings: object) -> object:
            return of(registry=vllms, **settings)

        return make

    KvbmPromMetrics(
        SimpleNamespace(kv_transfer_config=None),
        {each: kind(each) for each in (PromCounter, PromGauge, PromHistogram)},
        [],
        {},
    )
    names = labels_by_name(ours)
    assert names
    assert names.items() <= labels_by_name(vllms).items()
