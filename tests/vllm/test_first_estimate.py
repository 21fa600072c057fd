"""What workers measure at start-up reaches the gate before the first load, from the slowest of them."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from dynamo_connectors.load_gate import LoadGate
from dynamo_connectors.vllm.lasting import LastingTiers
from dynamo_connectors.vllm.messages import WorkerReports
from tests.vllm.fakes import BLOCK, keep, make, request

#: A block of 1000 bytes and 16 tokens, computed in 1.6 ms: read in 10 ms, or in 0.1 ms.
SLOW, FAST, PREFILL = 1e5, 1e7, 1e-4


def offered(rate: float | None) -> int:
    """Tokens that are offered of a prefix of four blocks that only the disk holds."""
    gate = LoadGate()
    gate.observe_prefill(2048, 2048 * PREFILL)
    half, _ = make(dram=4, disk=32, gate=gate)
    keep(half, "old", [1, 2, 3, 4])
    keep(half, "new", [5, 6, 7, 8])
    half.worker_reports(WorkerReports(rates={} if rate is None else {"nvme_ssd": rate}))
    what = request("again", 4, "old")
    half.new_request(what)
    tokens = half.matched_tokens(what, 0)
    half.check()
    assert tokens is not None
    return tokens


def test_a_slow_disk_is_refused_before_its_first_load() -> None:
    assert offered(SLOW) == 0
    assert offered(FAST) == 4 * BLOCK
    assert offered(None) == 4 * BLOCK


def test_the_slowest_worker_counts() -> None:
    one, other = WorkerReports(rates={"nvme_ssd": 3.0}), WorkerReports(rates={"nvme_ssd": 2.0})
    assert one.aggregate(other).rates == other.aggregate(one).rates == {"nvme_ssd": 2.0}
    assert one.aggregate(WorkerReports()).rates == WorkerReports().aggregate(one).rates == one.rates


def test_a_rate_is_told_once() -> None:
    lasting = LastingTiers(None, None, disk_rate=5.0)
    assert lasting.take_rates() == {"nvme_ssd": 5.0}
    assert lasting.take_rates() == {}
