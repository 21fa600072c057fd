"""Requests that share a prefix share its load, and none of them hangs when that load comes to nothing."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.vllm.fakes import BLOCK, end, keep, load, make, request


def test_forty_requests_share_one_load_and_go_on_together() -> None:
    half, _ = make()
    keep(half, "a", [1, 2, 3])
    plan = load(half, request("first", 3, "a"), [7, 8, 9])
    waiters = [request(f"waiter{number}", 4, "a") for number in range(40)]
    for what in waiters:
        half.new_request(what)
        assert half.matched_tokens(what, 0) is None
    assert half.take_counts()["shared_loads", ""] == 40
    end(half, plan)
    # The engine has cached the loaded blocks: all waiters find them in HBM, and nothing is left to load.
    assert [half.matched_tokens(what, 3 * BLOCK) for what in waiters] == [0] * 40
    assert not half.plan(is_idle=True).loads


def test_who_needs_more_than_the_load_brings_loads_the_rest() -> None:
    half, _ = make()
    keep(half, "a", [1, 2, 3, 4])
    plan = load(half, request("first", 2, "a"), [7, 8])
    more = request("more", 4, "a")
    half.new_request(more)
    assert half.matched_tokens(more, 0) is None
    # Its own prefix in HBM reaches behind the load: nothing to wait for.
    assert half.matched_tokens(more, 2 * BLOCK) == 2 * BLOCK
    end(half, plan)


@pytest.mark.parametrize("reason", ["bad_checksum", "unreachable", "timeout"])
def test_waiters_go_on_when_the_load_fails(reason: str) -> None:
    half, _ = make()
    keep(half, "a", [1, 2])
    plan = load(half, request("first", 2, "a"), [7, 8])
    waiter, other = request("waiter", 2, "a"), request("other", 2, "a")
    half.new_request(waiter)
    assert half.matched_tokens(waiter, 0) is None
    first_key = plan.loads[0].items[0].key
    end(half, plan, {plan.loads[0].job_id: {first_key: reason}})
    # Damaged bytes are gone for all. Who has waited as long as a load may take does not do it again; others may.
    assert half.matched_tokens(waiter, 0) == (2 * BLOCK if reason == "unreachable" else 0)
    half.new_request(other)
    assert half.matched_tokens(other, 0) == (0 if reason == "bad_checksum" else 2 * BLOCK)
    half.finished(waiter, [[]], 0)
    half.check()


def test_a_request_whose_load_failed_computes_instead_of_asking_for_ever() -> None:
    half, _ = make()
    keep(half, "a", [1, 2])
    first = request("first", 2, "a")
    plan = load(half, first, [7, 8])
    end(half, plan, {plan.loads[0].job_id: {plan.loads[0].items[0].key: "deadline"}})
    assert half.matched_tokens(first, 0) == 0


def test_waiters_go_on_when_the_loader_is_aborted() -> None:
    half, _ = make()
    keep(half, "a", [1, 2])
    first = request("first", 2, "a")
    plan = load(half, first, [7, 8])
    waiter = request("waiter", 2, "a")
    half.new_request(waiter)
    assert half.matched_tokens(waiter, 0) is None
    half.finished(first, [[7, 8]], 2 * BLOCK)
    # Its blocks will be freed unread, so the waiter loads for itself while that copy is still running.
    assert half.matched_tokens(waiter, 0) == 2 * BLOCK
    half.after_alloc(waiter, [[5, 6]], 2 * BLOCK)
    end(half, half.plan(is_idle=False))
    end(half, plan)
    half.finished(waiter, [[5, 6]], 2 * BLOCK)
    assert not half.has_work


def test_a_waiter_that_is_aborted_leaves_nothing_behind() -> None:
    half, _ = make()
    keep(half, "a", [1, 2])
    plan = load(half, request("first", 2, "a"), [7, 8])
    waiter = request("waiter", 2, "a")
    half.new_request(waiter)
    assert half.matched_tokens(waiter, 0) is None
    half.finished(waiter, [[]], 0)
    end(half, plan)
    assert not half.has_work
