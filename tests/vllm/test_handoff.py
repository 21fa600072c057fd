"""The two scheduler halves of a hand-off alone: what the ticket says, what is leased, and who gets it back when."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from dynamo_connectors.config import PEER
from dynamo_connectors.transport.tickets import Ticket
from dynamo_connectors.vllm.handoff import SIGNATURE, Identity, Trust, offered, wants_handoff
from dynamo_connectors.vllm.messages import StepPlan, WorkerReports
from dynamo_connectors.vllm.scheduler import SchedulerHalf
from tests.vllm.fakes import BLOCK, FakeRequest, end, keep, load, make, offer_all, request

IDENTITY = Identity("engine-p", "10.0.0.7", 5700, 1, b"secret")
TRUST = Trust(b"secret", local_only=False)


def prefill_half(**chosen: Any) -> SchedulerHalf:
    half, _ = make(**chosen)
    half.take_role(IDENTITY, None)
    return half


def decode_half(**chosen: Any) -> SchedulerHalf:
    half, _ = make(**chosen)
    half.take_role(None, TRUST)
    return half


def prefilled(half: SchedulerHalf, blocks: int = 3) -> tuple[FakeRequest, dict[str, Any], StepPlan]:
    """A request whose last blocks are on their way to host memory when it is answered."""
    what = request("a", blocks, do_remote_decode=True)
    half.new_request(what)
    half.offer("a", blocks * BLOCK, 0, lambda: [list(range(5, 5 + blocks))])
    half.finished(what, [list(range(5, 5 + blocks))], blocks * BLOCK)
    params = half.hand_off(what, blocks * BLOCK)
    assert params is not None
    return what, params, half.plan(is_idle=True)


def ended(half: SchedulerHalf, plan: StepPlan, num: int = 1) -> None:
    """Workers say that the leases of the plan have ended."""
    half.worker_reports(WorkerReports({job.job_id: num for job in plan.exports}))


def test_the_answer_speaks_the_engines_own_protocol() -> None:
    _, params, _ = prefilled(prefill_half())
    assert wants_handoff({"do_remote_decode": True})
    assert params["do_remote_prefill"] is True
    assert params["do_remote_decode"] is False
    needed = {"remote_engine_id", "remote_request_id", "remote_host", "remote_port", "remote_block_ids", "tp_size"}
    assert needed <= params.keys()
    assert params["remote_num_tokens"] == 3 * BLOCK
    offer, problem = offered(params, TRUST)
    assert problem == ""
    assert offer is not None
    assert Ticket.decode(offer.ticket) == Ticket("10.0.0.7", 5700, bytes.fromhex(params["dynamo_lease"]), 1)


def test_blocks_are_exported_when_they_have_arrived_and_pinned_until_the_lease_ends() -> None:
    half = prefill_half(dram=6, workers=2)
    _, params, plan = prefilled(half)
    assert len(offer_all(half, request("fills the rest", 3), [21, 22, 23]).stores[0].items) == 3
    lease = bytes.fromhex(params["dynamo_lease"])
    assert plan.announced == [lease]
    assert not plan.exports, "their bytes are not there yet"
    end(half, plan)
    end(half, plan)
    export = half.plan(is_idle=True)
    assert [key for key, _ in export.exports[0].slots] == request("a", 3).block_hashes
    assert not offer_all(half, request("evicts", 3), [1, 2, 3]).stores, "the lease protects every slot"
    ended(half, export)
    assert not offer_all(half, request("evicts too", 3), [1, 2, 3]).stores, "one worker's reader is not done"
    ended(half, export)
    assert offer_all(half, request("evicts at last", 3), [1, 2, 3]).stores


def test_leases_keep_half_of_host_memory_at_most() -> None:
    half = prefill_half(dram=4)
    _, params, plan = prefilled(half)
    end(half, plan)
    export = half.plan(is_idle=True)
    assert [key for key, _ in export.exports[0].slots] == request("a", 3).block_hashes[:2]
    assert params["remote_num_tokens"] == 3 * BLOCK, "the reader finds that the last one is gone"
    assert half.take_counts()["nixl_unexported_blocks", ""] == 1
    again = half.hand_off(request("a", 3, do_remote_decode=True), 3 * BLOCK)
    assert again is not None
    second = half.plan(is_idle=True)
    assert len(second.exports[0].slots) == 2, "a block in two leases is kept once"
    ended(half, export)
    ended(half, second)
    half.check()
    assert len(offer_all(half, request("evicts", 4), [1, 2, 3, 4]).stores[0].items) == 4


def test_blocks_that_did_not_arrive_shorten_the_export() -> None:
    half = prefill_half()
    what, _, plan = prefilled(half)
    end(half, plan, {plan.stores[0].job_id: {what.block_hashes[1]: "internal_error"}})
    assert [key for key, _ in half.plan(is_idle=True).exports[0].slots] == what.block_hashes[:1]


def test_an_idle_engine_steps_until_its_workers_have_heard_and_then_rests() -> None:
    half = prefill_half()
    _, _, plan = prefilled(half)
    assert half.has_work
    end(half, plan)
    assert half.has_work
    half.plan(is_idle=True)
    assert not half.has_work, "nobody waits for a lease to end"


def test_a_reset_leaves_nothing_to_hand_over() -> None:
    half = prefill_half()
    _, _, plan = prefilled(half)
    half.reset()
    end(half, plan)
    after = half.plan(is_idle=True)
    assert after.forget
    assert [export.slots for export in after.exports] == [()]


def test_without_a_role_nothing_is_handed_over_and_nothing_taken() -> None:
    half, _ = make()
    what = keep(half, "a", [1, 2], do_remote_decode=True)
    assert half.hand_off(what, 2 * BLOCK) is None
    _, params, _ = prefilled(prefill_half())
    assert half.matched_tokens(FakeRequest("d", request("b", 3).block_hashes, params), 0) == 0


def decode_request(params: dict[str, Any], blocks: int = 3, prefix: str = "a") -> FakeRequest:
    return FakeRequest("d", request(prefix, blocks).block_hashes, params)


def test_what_no_tier_here_holds_comes_from_the_peer() -> None:
    _, params, _ = prefilled(prefill_half())
    half = decode_half()
    keep(half, "a", [1])  # the first block of the same prompt
    what = decode_request(params, blocks=5)
    plan = load(half, what, [10, 11, 12, 13, 14])
    assert len(plan.watch) == 1
    assert [(item.tier, item.block) for item in plan.loads[0].items] == [
        ("host_dram", 10), (PEER, 11), (PEER, 12),
    ]  # fmt: skip
    assert plan.loads[0].items[1].chunk == plan.watch[0]
    end(half, plan)
    after = half.plan(is_idle=False)
    assert after.unwatch == plan.watch, "the peer may have its blocks back"
    assert half.take_counts()["hit_blocks", PEER] == 2


def test_without_a_secret_a_client_cannot_send_this_engine_to_another_host() -> None:
    _, params, _ = prefilled(prefill_half())
    half, _ = make()
    half.take_role(None, Trust(b"secret", local_only=True))
    assert half.matched_tokens(decode_request(params), 0) == 0
    here = signed({**params, "remote_host": "::1"})
    assert half.matched_tokens(FakeRequest("e", request("a", 3).block_hashes, here), 0)


def signed(params: dict[str, Any]) -> dict[str, Any]:
    """As the engine that `params` name would have signed them."""
    lease, workers = bytes.fromhex(params["dynamo_lease"]), params["tp_size"]
    ticket = Ticket(params["remote_host"], params["remote_port"], lease, workers)
    return {**params, SIGNATURE: ticket.signature(b"secret", params["remote_num_tokens"]).hex()}


@pytest.mark.parametrize(
    "change",
    [
        {SIGNATURE: None},
        {SIGNATURE: "00" * 32},
        {SIGNATURE: "\udc80"},
        {"remote_host": "10.0.0.8"},
        {"remote_port": 5701},
        {"remote_num_tokens": 2 * BLOCK},
        {"tp_size": 2},
        {"dynamo_lease": "ab" * 16},
    ],
)
def test_a_client_cannot_send_this_engine_anywhere_with_a_ticket_of_its_own(change: dict[str, Any]) -> None:
    _, params, _ = prefilled(prefill_half())
    half = decode_half()
    what = decode_request({**params, **change})
    half.new_request(what)
    assert half.matched_tokens(what, 0) == 0
    assert not half.plan(is_idle=True).watch, "nobody is met for it"
    counts = half.take_counts()
    assert counts["nixl_refused_messages", "unsigned_ticket"] == 1
    assert counts["ignored_hints", ""] == 1


def test_a_hand_off_that_fails_is_not_tried_again() -> None:
    _, params, _ = prefilled(prefill_half())
    half = decode_half()
    what = decode_request(params)
    plan = load(half, what, [10, 11, 12])
    end(half, plan, {plan.loads[0].job_id: {what.block_hashes[1]: "stale"}})
    assert half.matched_tokens(what, 0) == 0
    counts = half.take_counts()
    assert counts["load_failures", "stale"] == 1
    assert half.plan(is_idle=False).unwatch


def test_a_request_that_leaves_before_its_turn_lets_go() -> None:
    _, params, _ = prefilled(prefill_half())
    half = decode_half()
    what = decode_request(params)
    half.new_request(what)
    watched = half.plan(is_idle=True).watch
    half.finished(what, [[]], 0)
    assert half.has_work
    assert half.plan(is_idle=True).unwatch == watched


def test_a_request_that_takes_nothing_lets_go() -> None:
    _, params, _ = prefilled(prefill_half())
    half = decode_half()
    what = decode_request(params)
    half.new_request(what)
    watched = half.plan(is_idle=True).watch
    half.after_alloc(what, [[10, 11, 12]], 0)
    assert half.plan(is_idle=False).unwatch == watched


def test_a_reset_lets_go_of_what_queued_requests_were_offered() -> None:
    """It was computed with the weights of before, as far as anybody knows."""
    _, params, _ = prefilled(prefill_half())
    half = decode_half()
    what = decode_request(params)
    half.new_request(what)
    watched = half.plan(is_idle=True).watch
    assert half.matched_tokens(what, 0) == 3 * BLOCK
    assert half.reset()
    assert half.plan(is_idle=True).unwatch == watched
    assert half.matched_tokens(what, 0) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"dynamo_lease": None},
        {"dynamo_lease": "not hex"},
        {"dynamo_lease": "00" * 16},
        {"dynamo_lease": "ab"},
        {"remote_host": "a b\n"},
        {"remote_host": None},
        {"remote_host": "10.0.0.7\n"},
        {"remote_port": 0},
        {"remote_port": 1 << 70},
        {"remote_port": "5700"},
        {"remote_num_tokens": -1},
        {"remote_num_tokens": True},
        {"tp_size": -1},
        {"tp_size": None},
        {"remote_num_tokens": 1 << 40},
    ],
)
def test_a_ticket_that_makes_no_sense_is_told_and_computed(change: dict[str, Any]) -> None:
    _, params, _ = prefilled(prefill_half())
    half = decode_half()
    assert half.matched_tokens(decode_request({**params, **change}), 0) == 0
    assert half.take_counts()["ignored_hints", ""] == 1
