"""After a restart a block counts only where every worker has its share."""

from __future__ import annotations

import pytest

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.vllm.recovery import Recovery

A, B, C = (BlockKey(name) for name in (b"a", b"b", b"c"))


def test_only_what_all_workers_found_under_the_same_slot_is_recovered() -> None:
    recovery = Recovery(2, ["nvme_ssd"])
    assert recovery.hear({"nvme_ssd": [(0, A), (2, B), (1, C)]}, 1) is None
    assert not recovery.is_complete
    found = recovery.hear({"nvme_ssd": [(1, C), (3, B), (0, A)]}, 1)
    assert found == {"nvme_ssd": [(0, A), (1, C)]}
    assert recovery.is_complete


def test_a_worker_that_found_nothing_empties_the_tier() -> None:
    recovery = Recovery(3, ["nvme_ssd"])
    recovery.hear({"nvme_ssd": [(0, A)]}, 2)
    assert recovery.hear({}, 1) == {"nvme_ssd": []}


def test_without_such_tiers_there_is_nothing_to_wait_for() -> None:
    recovery = Recovery(2, [])
    assert recovery.is_complete
    assert recovery.hear({}, 0) is None


def test_a_worker_that_speaks_twice_is_a_bug() -> None:
    recovery = Recovery(1, ["nvme_ssd"])
    recovery.hear({"nvme_ssd": []}, 1)
    with pytest.raises(AssertionError, match="0 were expected"):
        recovery.hear({"nvme_ssd": []}, 1)
