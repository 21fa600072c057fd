"""What tiers hold is told whenever it has changed, also in a step that counts nothing; and only then."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from dynamo_connectors.tiers.index_stats import IndexStats
from dynamo_connectors.vllm.connector import DynamoConnector


def holding(pinned: int) -> dict[str, IndexStats]:
    return {"host_dram": IndexStats(10, 4, 0, pinned, 0, 0, 0)}


def test_pins_that_end_in_a_quiet_step_are_told() -> None:
    tiers = [holding(3), holding(3), holding(0), holding(0)]
    connector = object.__new__(DynamoConnector)
    connector._worker, connector._told_tiers = None, {}
    connector._scheduler = SimpleNamespace(take_counts=dict, tier_stats=lambda: tiers.pop(0))
    told = [connector.get_kv_connector_stats() for _ in range(4)]
    assert [stats and stats.data["pinned"] for stats in told] == [{"host_dram": 3}, None, {"host_dram": 0}, None]
