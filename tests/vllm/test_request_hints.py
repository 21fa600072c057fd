"""Hints, gate, touches and recovery in the scheduler half."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

pytest.importorskip("vllm")

from dynamo_connectors.vllm.messages import WorkerReports
from dynamo_connectors.vllm.recovery import Find
from tests.vllm.fakes import BLOCK, NOW, end, keep, load, make, offer_all, request, settle


@pytest.fixture(autouse=True)
def clock() -> Iterator[None]:
    NOW[0] = 0.0
    yield
    NOW[0] = 0.0


def test_blocks_of_a_pinned_request_outlive_a_flood_until_their_time_comes() -> None:
    half, _ = make(dram=8)
    keep(half, "pinned", [1, 2], kvbm_pin_ttl_seconds=60)
    for name in ("f1", "f2", "f3"):
        keep(half, name, [3, 4, 5, 6])
    assert half.matched_tokens(request("again", 2, "pinned"), 0) == 2 * BLOCK
    NOW[0] = 61.0
    half.plan(is_idle=True)
    for name in ("f4", "f5", "f6"):
        keep(half, name, [3, 4, 5, 6])
    assert half.matched_tokens(request("late", 2, "pinned"), 0) == 0


def test_a_request_that_must_not_be_stored_is_not() -> None:
    half, holds = make()
    plan = offer_all(half, request("secret", 3, kvbm_no_store=True), [1, 2, 3])
    assert (plan.stores, holds.held_blocks) == ([], 0)


def test_a_hint_that_makes_no_sense_is_counted_and_the_request_served() -> None:
    half, _ = make()
    plan = offer_all(half, request("a", 2, kvbm_pin_ttl_seconds="soon", kvbm_nonsense=1), [1, 2])
    assert len(plan.stores[0].items) == 2
    assert half.take_counts()["ignored_hints", ""] == 2
    end(half, plan)


def on_disk(prefetch: bool, waiting: bool) -> list[str]:
    """Where two blocks lie that were on disk when a request for them came."""
    half, _ = make(dram=8, disk=32)
    keep(half, "a", [1, 2])
    for name in ("f1", "f2"):
        keep(half, name, [3, 4, 5, 6])
    if waiting:
        half.new_request(request("queued", 1))
    what = request("b", 2, "a", **({"kvbm_prefetch": True} if prefetch else {}))
    half.new_request(what)
    settle(half)
    plan = load(half, what, [8, 9])
    end(half, plan)
    return [item.tier for item in plan.loads[0].items]


def test_a_request_brings_its_blocks_up_when_it_says_so_or_has_to_wait() -> None:
    assert on_disk(prefetch=False, waiting=False) == ["nvme_ssd", "nvme_ssd"]
    assert on_disk(prefetch=True, waiting=False) == ["host_dram", "host_dram"]
    assert on_disk(prefetch=False, waiting=True) == ["host_dram", "host_dram"]


class FixedGate:
    """Lets two blocks pass and remembers what it was told."""

    def __init__(self) -> None:
        self.loads: list[tuple[str, int, float]] = []
        self.prefills: list[tuple[int, float]] = []
        self.asked: list[tuple[list[str], int, int]] = []
        self.load_seconds: float | None = None
        self.step_seconds = 0.0

    def expected_load_seconds(self, tier: str, num_bytes: int) -> float | None:
        assert tier == "host_dram"
        return self.load_seconds and self.load_seconds * num_bytes / 1000

    def expected_step_seconds(self, tokens: int) -> float:
        return self.step_seconds

    def observe_load(self, tier: str, num_bytes: int, seconds: float) -> None:
        self.loads.append((tier, num_bytes, seconds))

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        self.prefills.append((tokens, seconds))

    def admit(self, run: Sequence[str], block_bytes: int, block_tokens: int) -> int:
        self.asked.append((list(run), block_bytes, block_tokens))
        return 2


def test_the_gate_is_asked_and_what_it_refuses_is_counted() -> None:
    gate = FixedGate()
    half, _ = make(gate=gate)
    keep(half, "a", [1, 2, 3, 4])
    assert half.matched_tokens(request("b", 4, "a"), 0) == 2 * BLOCK
    assert gate.asked == [(["host_dram"] * 4, 1000, BLOCK)]
    assert half.take_counts()["refused_blocks", ""] == 2


def test_a_step_hides_loads_that_are_expected_to_end_before_it() -> None:
    gate = FixedGate()
    half, _ = make(gate=gate)
    keep(half, "a", [1, 2])
    half.new_request(request("computed", 10))
    half.step_planned({}, {"computed": 10 * BLOCK})
    for name, load_seconds, step_seconds, hidden in (
        ("unknown", None, 1.0, False),
        ("short", 0.4, 1.0, True),
        ("long", 0.6, 1.0, False),
    ):
        gate.load_seconds, gate.step_seconds = load_seconds, step_seconds
        plan = load(half, request(name, 2, "a"), [8, 9])
        assert plan.hides_loads is hidden, name
        end(half, plan)
    gate.load_seconds = 0.1
    half.step_planned({"computed": 10 * BLOCK}, {"computed": 1})
    plan = load(half, request("decoding", 2, "a"), [8, 9])
    assert not plan.hides_loads, "what prefill takes at least says nothing of a step that only decodes"
    end(half, plan)
    half.step_planned({}, {"computed": 10 * BLOCK})
    assert not load(half, request("pins", 2, "a", kvbm_pin_ttl_seconds=9), [8, 9]).hides_loads, "it may not run ahead"


def test_the_gate_learns_from_loads_and_steps() -> None:
    gate = FixedGate()
    half, _ = make(gate=gate)
    keep(half, "a", [1, 2])
    plan = load(half, request("b", 2, "a"), [8, 9])
    job = plan.loads[0].job_id
    half.worker_reports(WorkerReports({job: 1}, moved={job: (("host_dram", 2000, 0.5),)}))  # type: ignore[dict-item]
    assert gate.loads == [("host_dram", 2000, 0.5)]
    plan = load(half, request("b2", 2, "a"), [8, 9])
    job, late, lost = plan.loads[0].job_id, plan.loads[0].items[0].key, plan.loads[0].items[1].key
    failed = {job: {late: "timeout", lost: "wrong_key"}}
    half.worker_reports(WorkerReports({job: 1}, failed, {job: (("host_dram", 0, 30.0),)}))  # type: ignore[dict-item]
    assert gate.loads[1:] == [("host_dram", 1000, 30.0)], "a tier that does not answer is slow, not unknown"
    half.new_request(request("c", 8))
    half.step_planned({"c": 0}, {"c": 8 * BLOCK})
    NOW[0] = 2.0
    half.step_ended()
    assert gate.prefills == [(8 * BLOCK, 2.0)]


def test_host_memory_takes_a_block_at_its_second_use_when_told_so() -> None:
    half, _ = make(min_touches={"host_dram": 2})
    assert not offer_all(half, request("a", 2), [1, 2]).stores
    assert half.take_counts()["dropped_blocks", "not_admitted"] == 2
    plan = offer_all(half, request("b", 2, "a"), [1, 2])
    assert len(plan.stores[0].items) == 2
    end(half, plan)


def test_what_all_workers_found_on_their_disks_is_served_after_a_restart() -> None:
    half, _ = make(disk=8, workers=2, lasting=("nvme_ssd",))
    found = request("a", 3)
    first, second, third = found.block_hashes
    assert half.has_work
    half.worker_reports(WorkerReports(finds={"nvme_ssd": Find(1, [(5, first), (6, second), (7, third)])}))
    assert half.matched_tokens(found, 0) == 0
    half.worker_reports(WorkerReports(finds={"nvme_ssd": Find(1, [(5, first), (6, second), (0, third)])}))
    assert half.take_counts()["recovered_blocks", "nvme_ssd"] == 2
    plan = load(half, found, [1, 2])
    assert [(item.tier, item.slot) for item in plan.loads[0].items] == [("nvme_ssd", 5), ("nvme_ssd", 6)]
    end(half, plan)
    end(half, plan)


def test_the_first_requests_wait_a_bounded_time_for_what_a_store_lists() -> None:
    """The list arrives with a step, and a step comes with the first request: it would always come too late."""
    for is_listed in (True, False):
        half, _ = make(objects=4, lasting=("object_store",), find_seconds=1.0)
        first, second = request("a", 2), request("b", 2, prefix="a")
        assert half.matched_tokens(first, 0) is None
        NOW[0] += 0.9
        assert [half.matched_tokens(each, 0) for each in (first, second)] == [None, None]
        if is_listed:
            find = Find(1, [(0, first.block_hashes[1])])
            half.worker_reports(WorkerReports(finds={"object_store": find}))
            assert [half.matched_tokens(each, 0) for each in (first, second)] == [2 * BLOCK] * 2
            assert half.take_counts()["early_requests", ""] == 0
        else:
            NOW[0] += 0.1
            assert [half.matched_tokens(each, 0) for each in (first, second, second)] == [0, 0, 0]
            assert half.take_counts()["early_requests", ""] == 2


def test_nobody_waits_for_a_list_that_cannot_help_nor_longer_than_two_seconds() -> None:
    half, _ = make(objects=4, lasting=("object_store",), find_seconds=30.0)
    what = request("a", 2)
    assert half.matched_tokens(what, 2 * BLOCK) == 0, "all its blocks are computed"
    assert half.matched_tokens(what, BLOCK) is None
    NOW[0] += 2.0
    assert half.matched_tokens(what, BLOCK) == 0
    other, _ = make(objects=4, lasting=("object_store",), find_seconds=30.0)
    other.reset()
    assert other.matched_tokens(what, 0) == 0, "after a reset nothing that is listed is served"


def test_nothing_goes_to_a_disk_that_workers_have_not_spoken_about() -> None:
    half, _ = make(disk=8, workers=1, lasting=("nvme_ssd",))
    end(half, offer_all(half, request("a", 2), [1, 2]))
    assert not half.plan(is_idle=True).moves
    half.worker_reports(WorkerReports(finds={"nvme_ssd": Find(1, [])}))
    assert half.plan(is_idle=True).moves


def test_after_a_reset_nothing_from_before_comes_back() -> None:
    half, _ = make(disk=8, lasting=("nvme_ssd",))
    what = request("a", 1)
    assert half.reset()
    half.worker_reports(WorkerReports(finds={"nvme_ssd": Find(1, [(0, what.block_hashes[0])])}))
    assert half.matched_tokens(what, 0) == 0
    assert half.plan(is_idle=True).forget
    assert not half.plan(is_idle=True).forget
