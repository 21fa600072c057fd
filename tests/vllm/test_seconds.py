"""Times are counted in whole microseconds and told in seconds."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dynamo_connectors.vllm.metrics import KvbmPromMetrics


def test_microseconds_are_told_as_seconds() -> None:
    registry = CollectorRegistry()
    types = {kind: partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    metrics = KvbmPromMetrics(SimpleNamespace(kv_transfer_config=None), types, ["engine"], {0: ["0"]})
    metrics.observe({"counts": {"nixl_transfer_microseconds|": 1_500_000, "nixl_descriptors|": 7}})
    labels = {"engine": "0"}
    assert registry.get_sample_value("dynamo_nixl_transfer_seconds_total", labels) == 1.5
    assert registry.get_sample_value("dynamo_nixl_descriptors_total", labels) == 7
