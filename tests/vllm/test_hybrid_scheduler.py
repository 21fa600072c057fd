"""The scheduler half with several KV cache groups: what a window needs, what it has lost, what is named apart."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from dynamo_connectors.vllm.groups import Group
from tests.vllm.fakes import BLOCK, FakeRequest, end, keep, load, make, request

FULL, WINDOW = Group(BLOCK), Group(BLOCK, 2 * BLOCK)
GROUPS = {"groups": (FULL, WINDOW), "dram": 32}


def asking(name: str, blocks: int, prefix: str) -> FakeRequest:
    """One that shares `blocks` blocks and has one token more."""
    return request(name, blocks + 1, prefix)


def test_a_window_is_loaded_and_the_full_group_whole() -> None:
    half, _ = make(**GROUPS)
    keep(half, "a", [1, 2, 3, 4], [5, 6, 7, 8])
    plan = load(half, asking("b", 4, "a"), [11, 12, 13, 14], [0, 0, 17, 18])
    assert [item.block for item in plan.loads[0].items] == [11, 12, 13, 14, 17, 18]
    end(half, plan)
    counts = half.take_counts()
    assert counts["hit_blocks", "host_dram"] == 6


def test_blocks_that_the_window_has_left_are_neither_stored_nor_needed() -> None:
    half, _ = make(**GROUPS)
    keep(half, "a", [1, 2, 3, 4], [0, 0, 7, 8])
    assert half.matched_tokens(asking("b", 4, "a"), 0) == 4 * BLOCK
    assert half.matched_tokens(asking("c", 4, "a"), BLOCK) == 3 * BLOCK
    # A prefix that ends earlier would need the window before it, which is gone.
    assert half.matched_tokens(asking("d", 3, "a"), 0) == 0


def test_the_last_token_of_a_prompt_stays_out_of_the_prefix() -> None:
    half, _ = make(**GROUPS)
    keep(half, "a", [1, 2, 3, 4], [5, 6, 7, 8])
    assert half.matched_tokens(request("b", 4, "a"), 0) == 3 * BLOCK


def test_the_same_block_of_two_groups_is_two_blocks() -> None:
    half, _ = make(**GROUPS)
    what = request("a", 2)
    half.new_request(what)
    half.offer("a", 2 * BLOCK, 0, lambda: [[1, 2], [3, 4]])
    plan = half.plan(is_idle=False)
    items = [item for job in plan.stores for item in job.items]
    assert len({item.key for item in items}) == len({item.slot for item in items}) == 4
    end(half, plan)


def test_a_damaged_window_block_costs_the_prefix_but_not_the_request() -> None:
    half, _ = make(**GROUPS)
    keep(half, "a", [1, 2, 3, 4], [5, 6, 7, 8])
    victim = asking("b", 4, "a")
    plan = load(half, victim, [11, 12, 13, 14], [0, 0, 17, 18])
    damaged = plan.loads[0].items[-1].key
    end(half, plan, {plan.loads[0].job_id: {damaged: "bad_checksum"}})
    # The request itself computes on; others get what is left: the windows before the damaged block.
    assert half.matched_tokens(victim, 0) == 0
    assert half.matched_tokens(asking("c", 4, "a"), 0) == 3 * BLOCK


def test_prompt_blocks_of_a_running_step_are_kept_before_the_window_leaves_them() -> None:
    half, holds = make(**GROUPS)
    what = request("a", 4)
    half.new_request(what)
    half.offer("a", 0, 4 * BLOCK, lambda: [[1, 2, 3, 4], [5, 6, 7, 8]])
    assert holds.held_blocks == 8
    end(half, half.plan(is_idle=False))
    assert half.matched_tokens(asking("b", 2, "a"), 0) == 2 * BLOCK
