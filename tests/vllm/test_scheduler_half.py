"""The scheduler half alone: what is offered, promised, leased and let go, and what becomes of it when things fail."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from dynamo_connectors.vllm.messages import WorkerReports
from tests.vllm.fakes import BLOCK, end, keep, load, make, offer_all, request, settle


def test_offloaded_blocks_are_matched_after_every_worker_has_them() -> None:
    half, holds = make(workers=2)
    first = request("a", 3)
    plan = offer_all(half, first, [5, 6, 7])
    assert [item.block for item in plan.stores[0].items] == [5, 6, 7]
    assert holds.held_blocks == 3
    again = request("b", 3, prefix="a")
    assert half.matched_tokens(again, 0) == 0
    end(half, plan)
    assert (half.matched_tokens(again, 0), holds.held_blocks) == (0, 3)
    end(half, plan)
    assert (half.matched_tokens(again, 0), holds.held_blocks) == (3 * BLOCK, 0)
    assert half.matched_tokens(again, BLOCK) == 2 * BLOCK
    assert not half.has_work


def test_a_block_that_one_worker_lost_is_kept_nowhere() -> None:
    half, _ = make(workers=2)
    first = request("a", 2)
    plan = offer_all(half, first, [1, 2])
    end(half, plan, {plan.stores[0].job_id: {first.block_hashes[0]: "write_failed"}})
    end(half, plan)
    assert half.matched_tokens(request("b", 2, prefix="a"), 0) == 0
    assert half.take_counts()["dropped_blocks", "write_failed"] == 1


def test_a_load_names_sources_and_targets_and_pins_until_its_end() -> None:
    half, _ = make(dram=2)
    end(half, offer_all(half, request("a", 2), [1, 2]))
    plan = load(half, request("b", 2, prefix="a"), [8, 9])
    assert [item.block for item in plan.loads[0].items] == [8, 9]
    # While the load reads both slots, newcomers find no room and are counted, never placed over them.
    assert not offer_all(half, request("c", 2), [3, 4]).stores
    assert half.take_counts()["dropped_blocks", "tier_busy"] == 2
    end(half, plan)
    assert offer_all(half, request("d", 2), [3, 4]).stores


def test_blocks_whose_load_is_running_are_never_offered() -> None:
    """vLLM counts them as computed from the start; their bytes are garbage until the load ends."""
    half, holds = make(dram=4, disk=8)
    keep(half, "a", [1, 2])
    keep(half, "evicts", [3, 4, 5, 6])
    loading = request("b", 2, prefix="a")
    plan = load(half, loading, [8, 9])
    assert [item.tier for item in plan.loads[0].items] == ["nvme_ssd", "nvme_ssd"]
    half.offer("b", 2 * BLOCK, 0, lambda: [[8, 9]])
    assert holds.held_blocks == 0
    half.finished(loading, [[8, 9]], 2 * BLOCK)
    assert holds.held_blocks == 0
    assert not half.plan(is_idle=True).stores
    end(half, plan)


def test_hbm_that_a_load_may_still_write_to_is_nobody_elses() -> None:
    """vLLM was told that the load has ended, so that it would give the blocks away when the request goes."""
    half, _ = make()
    keep(half, "a", [1, 2])
    what = request("b", 2, prefix="a")
    plan = load(half, what, [8, 9])
    holds = half._onboarding.holds
    assert holds is not None
    assert holds.held_blocks == 2
    half.finished(what, [[8, 9]], 2 * BLOCK)
    assert holds.held_blocks == 2
    end(half, plan)
    assert holds.held_blocks == 0
    half.check()


def test_who_may_run_ahead_of_its_load() -> None:
    half, _ = make()
    keep(half, "a", [1, 2])
    for name, may, hints in (("long", True, {}), ("pins", False, {"kvbm_pin_ttl_seconds": 9})):
        plan = load(half, request(name, 2, prefix="a", **hints), [8, 9])
        assert plan.loads[0].may_run_ahead is may, name
        end(half, plan)
    short = request("short", 2, prefix="a")
    short.max_tokens = 1
    plan = load(half, short, [8, 9])
    assert not plan.loads[0].may_run_ahead, "its blocks would not be kept: it can end before its load does"
    end(half, plan)


def test_a_load_to_the_last_token_comes_at_once() -> None:
    """vLLM computes that token again, and writes it into the last loaded block before any layer waits."""
    half, _ = make()
    keep(half, "a", [1, 2])
    for name, blocks, by_layers in (("whole", 2, False), ("longer", 3, True)):
        what = request(name, blocks, prefix="a")
        plan = load(half, what, [8, 9])
        assert plan.loads[0].may_run_ahead
        assert plan.loads[0].by_layers is by_layers, name
        end(half, plan)
        half.finished(what, [[8, 9]], 2 * BLOCK)


def test_a_step_that_waits_for_a_load_says_nothing_of_computing() -> None:
    half, _ = make()
    keep(half, "a", [1, 2])
    what = request("b", 42, prefix="a")
    plan = load(half, what, [8, 9])
    for ended_at, loads in ((1, True), (2, False)):
        half.step_planned({"b": 2 * BLOCK}, {"b": 40 * BLOCK})
        assert (half._steps.ended(half._clock() + ended_at) is None) is loads
        if loads:
            end(half, plan)


def test_a_request_that_was_preempted_while_its_load_runs_waits_for_it() -> None:
    half, _ = make()
    keep(half, "a", [1, 2])
    again = request("b", 2, prefix="a")
    plan = load(half, again, [8, 9])
    assert half.matched_tokens(again, 0) is None
    end(half, plan)
    assert half.matched_tokens(again, 0) == 2 * BLOCK


def test_a_damaged_block_is_never_offered_again_until_it_is_recomputed() -> None:
    half, _ = make()
    first = request("a", 3)
    end(half, offer_all(half, first, [1, 2, 3]))
    plan = load(half, request("b", 3, prefix="a"), [7, 8, 9])
    end(half, plan, {plan.loads[0].job_id: {first.block_hashes[1]: "bad_checksum"}})
    assert half.matched_tokens(request("c", 3, prefix="a"), 0) == BLOCK
    half.offer("b", 3 * BLOCK, 0, lambda: [[7, 8, 9]])
    end(half, half.plan(is_idle=False))
    assert half.matched_tokens(request("c", 3, prefix="a"), 0) == 3 * BLOCK


def test_only_blocks_that_arrived_count_as_hits() -> None:
    half, _ = make()
    first = request("a", 3)
    end(half, offer_all(half, first, [1, 2, 3]))
    plan = load(half, request("b", 3, prefix="a"), [7, 8, 9])
    assert half.take_counts()["hit_blocks", "host_dram"] == 0
    end(half, plan, {plan.loads[0].job_id: {first.block_hashes[1]: "bad_checksum"}})
    counts = half.take_counts()
    assert (counts["hit_blocks", "host_dram"], counts["load_failures", "bad_checksum"]) == (2, 1)


def test_a_promise_whose_source_is_gone_becomes_missing_blocks() -> None:
    half, _ = make()
    end(half, offer_all(half, request("a", 2), [1, 2]))
    late = request("b", 2, prefix="a")
    half.new_request(late)
    tokens = half.matched_tokens(late, 0)
    half.reset()
    half.after_alloc(late, [[8, 9]], tokens)
    (job,) = half.plan(is_idle=False).loads
    assert (job.items, job.missing_blocks) == ((), (8, 9))
    assert half.take_counts()["load_failures", "evicted"] == 2
    half.worker_reports(WorkerReports({job.job_id: 1}))


@pytest.mark.parametrize("second_ends_first", [False, True])
def test_a_block_that_is_on_its_way_when_all_is_reset_may_set_out_again(second_ends_first: bool) -> None:
    """vLLM resets the connector under load too: a running request then offers what is still being copied."""
    half, holds = make()
    what = request("a", 2)
    plans = [offer_all(half, what, [1, 2])]
    half.reset()
    half.offer("a", 2 * BLOCK, 0, lambda: [[1, 2]])
    plans.append(half.plan(is_idle=False))
    assert [len(plan.stores[0].items) for plan in plans] == [2, 2]
    for plan in reversed(plans) if second_ends_first else plans:
        end(half, plan)
    half.check()
    assert holds.held_blocks == 0
    assert half.matched_tokens(request("b", 2, prefix="a"), 0) == 2 * BLOCK


def test_reset_refuses_while_a_load_brings_old_bytes() -> None:
    half, _ = make()
    end(half, offer_all(half, request("a", 2), [1, 2]))
    plan = load(half, request("b", 2, prefix="a"), [8, 9])
    assert half.reset() is False
    end(half, plan)
    assert half.reset() is True
    assert half.matched_tokens(request("c", 2, prefix="a"), 0) == 0


def test_finished_requests_offer_their_last_blocks_and_nothing_twice() -> None:
    half, holds = make()
    first = request("a", 3)
    plan = offer_all(half, first, [1, 2])
    assert len(plan.stores[0].items) == 2
    half.finished(first, [[1, 2, 3]], 3 * BLOCK + 5)
    tail = half.plan(is_idle=True)
    assert [item.block for item in tail.stores[0].items] == [3]
    assert tail.is_idle
    end(half, plan)
    end(half, tail)
    assert holds.held_blocks == 0


def test_only_a_share_of_each_request_leaves_hbm() -> None:
    half, _ = make(offload_ratio=0.5)
    plan = offer_all(half, request("a", 5), [1, 2, 3, 4, 5])
    assert [item.block for item in plan.stores[0].items] == [1, 2, 3]


def test_held_hbm_is_bounded_and_what_is_lost_is_counted() -> None:
    half, _ = make(max_held_blocks=2)
    first = request("a", 5)
    plan = offer_all(half, first, [1, 2, 3, 4, 5])
    assert len(plan.stores[0].items) == 2
    end(half, plan)
    half.finished(first, [[1, 2, 3, 4, 5]], 5 * BLOCK)
    assert half.take_counts()["dropped_blocks", "hbm_busy"] == 1


def test_blocks_out_of_the_attention_window_are_not_copied() -> None:
    half, _ = make()
    plan = offer_all(half, request("a", 4), [0, 0, 3, 4])
    assert [item.block for item in plan.stores[0].items] == [3, 4]


def test_blocks_sink_to_disk_and_are_loaded_from_there() -> None:
    half, _ = make(dram=4, disk=8)
    end(half, offer_all(half, request("a", 2), [1, 2]))
    assert half.has_work
    sinking = half.plan(is_idle=True)
    assert {(move.source_tier, move.target_tier) for move in sinking.moves} == {("host_dram", "nvme_ssd")}
    end(half, sinking)
    settle(half)
    keep(half, "b", [3, 4, 5, 6])
    plan = load(half, request("c", 2, prefix="a"), [8, 9])
    assert [item.tier for item in plan.loads[0].items] == ["nvme_ssd", "nvme_ssd"]
    end(half, plan)


def test_blocks_go_to_the_disk_in_batches_of_which_each_block_can_fail_alone() -> None:
    half, _ = make(dram=80, disk=80)
    what = request("a", 20)
    end(half, offer_all(half, what, list(range(1, 21))))
    sinking = half.plan(is_idle=True)
    assert [len(move.items) for move in sinking.moves] == [16, 4]
    lost = what.block_hashes[3]
    end(half, sinking, {sinking.moves[0].job_id: {lost: "write_failed"}})
    settle(half)
    counts = half.take_counts()
    assert (counts["offloaded_blocks", "nvme_ssd"], counts["move_failures", "write_failed"]) == (19, 1)
    assert half.tier_stats()["nvme_ssd"].ready_blocks == 19
    half.check()


def test_a_chunk_that_is_complete_after_its_request_goes_on_to_the_object_store() -> None:
    half, _ = make(dram=16, objects=4)
    what = request("a", 5)
    first = offer_all(half, what, [11, 12, 13])
    half.finished(what, [[11, 12, 13, 14, 15]], 5 * BLOCK)
    second = half.plan(is_idle=False)
    assert not second.moves
    end(half, first)
    end(half, second)
    third = half.plan(is_idle=True)
    chunks = [[item.key for item in move.items] for move in third.moves]
    assert chunks == [what.block_hashes[:2], what.block_hashes[2:4]]
    end(half, third)
    settle(half)
    half.check()


def test_host_memory_smaller_than_one_prompt_keeps_its_head_and_holds_nothing() -> None:
    half, holds = make(dram=2, disk=8)
    what = request("a", 5)
    plan = offer_all(half, what, [1, 2, 3, 4, 5])
    assert [item.block for item in plan.stores[0].items] == [1, 2]
    assert half.take_counts()["dropped_blocks", "tier_busy"] == 3
    end(half, plan)
    half.finished(what, [[1, 2, 3, 4, 5]], 5 * BLOCK)
    settle(half)
    assert holds.held_blocks == 0
    again = load(half, request("b", 5, prefix="a"), [6, 7])
    assert [(item.tier, item.block) for item in again.loads[0].items] == [("host_dram", 6), ("host_dram", 7)]
    end(half, again)
    half.check()
    assert {stats.pinned_blocks + stats.filling_blocks for stats in half.tier_stats().values()} == {0}


@pytest.mark.parametrize("blocks", [[20], [20, 0], [20, 0, 22]], ids=["too few", "the null block", "both"])
def test_blocks_that_do_not_fit_what_was_promised_are_computed(blocks: list[int]) -> None:
    """Which block is whose nobody can tell then: none is loaded, and nothing stays leased."""
    half, _ = make()
    keep(half, "a", [1, 2, 3])
    again = request("b", 4, prefix="a")
    half.new_request(again)
    assert half.matched_tokens(again, 0) == 3 * BLOCK
    half.after_alloc(again, [blocks], 3 * BLOCK)
    plan = half.plan(is_idle=False)
    (load,) = plan.loads
    assert (load.items, load.missing_blocks) == ((), tuple(block for block in blocks if block))
    assert half.tier_stats()["host_dram"].pinned_blocks == 0
    end(half, plan)
    assert half.matched_tokens(again, 0) == 0, "it computes"
    assert half.take_counts()["load_failures", "internal_error"] == len(load.missing_blocks)
    half.finished(again, [blocks], 0)
    half.check()
