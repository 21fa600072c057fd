"""An engine without requests: how long it goes on stepping for what lies below HBM."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

pytest.importorskip("vllm")

from dynamo_connectors.jobs import MoveJob
from dynamo_connectors.vllm.messages import StepPlan, WorkerReports
from dynamo_connectors.vllm.scheduler import MOVES_SECONDS
from tests.vllm.fakes import BLOCK, NOW, FakeRequest, end, make, request, settle


def test_a_disk_that_hangs_on_a_write_keeps_no_engine_from_going_idle() -> None:
    """vLLM puts off /sleep, pause and a clean exit for as long as there is work."""
    half, _ = make(dram=8, disk=8)
    what = request("a", 2)
    half.new_request(what)
    half.offer("a", 2 * BLOCK, 0, lambda: [[1, 2]])
    end(half, half.plan(is_idle=False))
    half.finished(what, [[1, 2]], 2 * BLOCK)
    hung = half.plan(is_idle=True)
    assert hung.moves
    assert half.has_work, "a disk that works is waited for"
    NOW[0] += MOVES_SECONDS
    assert not half.has_work
    end(half, hung)
    assert half.tier_stats()["nvme_ssd"].ready_blocks == 2, "its end is heard all the same"
    half.check()


def test_moves_that_wait_are_not_all_written_out_first() -> None:
    half, _ = make(dram=8, disk=32)
    what = request("a", 8)
    half.new_request(what)
    half.offer("a", 8 * BLOCK, 0, lambda: [list(range(1, 9))])
    end(half, half.plan(is_idle=False))
    half.finished(what, [list(range(1, 9))], 8 * BLOCK)
    end(half, half.plan(is_idle=True))
    assert half.has_work, "more moves wait than may run"
    NOW[0] += MOVES_SECONDS
    assert not half.has_work
    half.new_request(request("next", 1))
    assert half.has_work, "they go on with the next request"
    settle(half)
    assert half.tier_stats()["nvme_ssd"].ready_blocks == 8


class Idling(RuleBasedStateMachine):
    """Requests come and go, the disk ends its writes when it likes, and time passes."""

    @initialize()
    def start(self) -> None:
        NOW[0] = 0.0
        self.half, self.holds = make(dram=6, disk=12)
        self.requests: dict[str, FakeRequest] = {}
        self.moves: list[MoveJob] = []
        #: Stores whose end no worker has told yet.
        self.stores: list[int] = []
        self.count, self.left_at = 0, 0.0

    def take(self, plan: StepPlan) -> None:
        self.moves += plan.moves
        self.stores += [store.job_id for store in plan.stores]

    @rule(blocks=st.integers(1, 4))
    def comes(self, blocks: int) -> None:
        self.count += 1
        what = request(f"r{self.count % 5}-{self.count}", blocks, prefix=f"p{self.count % 5}")
        self.half.new_request(what)
        self.half.offer(what.request_id, blocks * BLOCK, 0, lambda: [list(range(1, blocks + 1))])
        self.requests[what.request_id] = what

    @precondition(lambda self: self.requests)
    @rule()
    def goes(self) -> None:
        _, what = self.requests.popitem()
        blocks = len(what.block_hashes)
        self.half.finished(what, [list(range(1, blocks + 1))], blocks * BLOCK)
        self.left_at = NOW[0]

    @rule()
    def step(self) -> None:
        self.take(self.half.plan(is_idle=not self.requests))

    @rule()
    def stores_end(self) -> None:
        self.half.worker_reports(WorkerReports(dict.fromkeys(self.stores, 1)))
        self.stores.clear()

    @precondition(lambda self: self.moves)
    @rule(fails=st.booleans())
    def a_move_ends(self, fails: bool) -> None:
        move = self.moves.pop(0)
        failed = {move.job_id: {item.key: "write_failed" for item in move.items}} if fails else {}
        self.half.worker_reports(WorkerReports({move.job_id: 1}, failed))

    @rule(seconds=st.sampled_from([0.5, MOVES_SECONDS]))
    def time_passes(self, seconds: float) -> None:
        NOW[0] += seconds

    @invariant()
    def goes_idle_in_time(self) -> None:
        self.half.check()
        if self.stores or self.holds.held_blocks:
            assert self.half.has_work, "HBM is held"
        elif not self.requests and NOW[0] - self.left_at >= MOVES_SECONDS:
            assert not self.half.has_work
        elif self.moves:
            assert self.half.has_work, "a healthy disk is waited for"

    def teardown(self) -> None:
        while self.requests:
            self.goes()
        self.stores_end()
        while self.moves:
            self.a_move_ends(False)
        settle(self.half)
        self.half.check()
        assert self.holds.held_blocks == 0


TestIdling = Idling.TestCase
TestIdling.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
