"""Beside another connector (vLLM's `MultiConnector`): what it has not brought is not KV. The scheduler half."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.vllm.fakes import BLOCK, end, keep, load, make, request


@pytest.mark.parametrize("is_told", [True, False], ids=["told", "not told yet"])
@pytest.mark.parametrize("was_kept", [False, True], ids=["new", "resumed"])
def test_a_request_that_leaves_while_another_connector_loads_for_it_leaves_nothing(
    was_kept: bool, is_told: bool
) -> None:
    """vLLM counts its tokens as computed when such a load begins, and asks what to keep when the request is aborted.

    vLLM 0.33 may count them before it tells anybody of the admission.
    """
    half, holds = make()
    what = request("a", 3)
    half.new_request(what)
    if was_kept:
        assert half.matched_tokens(what, 0) == 0
        half.after_alloc(what, [[5]], 0)
        half.offer("a", BLOCK, 0, lambda: [[5]])
        end(half, half.plan(is_idle=False))
    half.matched_tokens(what, 0)
    if is_told:
        half.after_alloc(what, [[7, 8, 9]], 0)  # another child was chosen
    half.finished(what, [[7, 8, 9]], 3 * BLOCK)
    assert holds.held_blocks == 0
    assert not half.plan(is_idle=True).stores
    half.check()


def test_what_another_connector_brought_is_kept_from_the_first_step_on() -> None:
    half, _ = make()
    what = request("a", 2)
    half.new_request(what)
    half.after_alloc(what, [[8, 9]], 0)
    half.offer("a", 2 * BLOCK, 0, lambda: [[8, 9]])
    assert [item.block for item in half.plan(is_idle=False).stores[0].items] == [8, 9]


def test_nothing_is_offered_before_a_load_within_a_step_is_known_to_have_gone_well() -> None:
    """With async scheduling the next step is planned meanwhile; vLLM tells at the end of the first what was lost."""
    half, holds = make()
    what = request("a", 3)
    half.new_request(what)
    half.after_alloc(what, [[7, 8, 9]], 0)
    for may_fail in (True, False):
        half.step_planned({"a": 2 * BLOCK}, {"a": BLOCK}, may_fail=may_fail)
        half.offer("a", 2 * BLOCK, BLOCK, lambda: [[7, 8, 9]])
        assert not half.plan(is_idle=False).stores
    half.step_ended()
    half.step_planned({"a": 3 * BLOCK}, {"a": 1})
    half.offer("a", 3 * BLOCK, 1, lambda: [[7, 8, 9]])
    assert holds.held_blocks == 3
    assert [item.block for item in half.plan(is_idle=False).stores[0].items] == [7, 8, 9]


@pytest.mark.parametrize("is_answered", [False, True])
def test_only_an_answer_is_certain_while_such_a_load_is_under_way(is_answered: bool) -> None:
    """vLLM answers a request once its last step has ended well, and takes an abort at any time."""
    half, holds = make()
    what = request("a", 2)
    half.new_request(what)
    half.after_alloc(what, [[8, 9]], 0)
    half.step_planned({"a": 0}, {"a": 2 * BLOCK}, may_fail=True)
    half.offer("a", 0, 2 * BLOCK, lambda: [[8, 9]])
    assert holds.held_blocks == 0
    half.finished(what, [[8, 9]], 2 * BLOCK, is_answered)
    assert holds.held_blocks == (2 if is_answered else 0)
    assert not half.take_counts()["dropped_blocks", "hbm_busy"]


def test_what_was_kept_before_stays_pinned_though_the_request_leaves_in_doubt() -> None:
    half, _ = make(dram=8)
    what = request("a", 2, kvbm_pin_ttl_seconds=60)
    half.new_request(what)
    half.after_alloc(what, [[1, 2]], 0)
    half.step_planned({"a": 0}, {"a": 2 * BLOCK})
    half.offer("a", 0, 2 * BLOCK, lambda: [[1, 2]])
    end(half, half.plan(is_idle=False))
    half.step_ended()
    half.step_planned({}, {}, may_fail=True)
    half.finished(what, [[1, 2]], 2 * BLOCK)
    for name in ("b", "c", "d", "e"):
        keep(half, name, [3, 4])
    half.step_ended()
    plan = load(half, request("again", 2, prefix="a"), [5, 6])
    assert [item.block for item in plan.loads[0].items] == [5, 6]
    end(half, plan)
