"""The scheduler's side of fetching a prefix that another engine holds: who is believed, and what is loaded then."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from hypothesis import given
from hypothesis import strategies as st

from dynamo_connectors.config import PEER
from dynamo_connectors.load_gate import LoadGate
from dynamo_connectors.transport.messages import STANDING_LEASE
from dynamo_connectors.transport.tickets import Ticket
from dynamo_connectors.vllm.fetch import name_of, wants_name, what_peers_have
from dynamo_connectors.vllm.handoff import UNSIGNED, Identity, Trust
from dynamo_connectors.vllm.scheduler import SchedulerHalf
from tests.vllm.fakes import BLOCK, end, keep, load, make, request

HOLDER = Identity("engine-a", "10.0.0.7", 5700, 1, b"secret")
NAME = name_of(HOLDER)
TRUST = Trust(b"secret", local_only=False)


def half_of_role(identity: Identity | None = None, trust: Trust | None = TRUST, **chosen: Any) -> SchedulerHalf:
    half, _ = make(**chosen)
    half.take_role(identity, trust)
    return half


def test_an_engine_tells_its_name_to_whoever_asks_for_it() -> None:
    half = half_of_role(HOLDER)
    asked = keep(half, "a", [1, 2], kvbm_tell_peer=True)
    assert half.hand_off(asked, 2 * BLOCK) == {"kvbm_peer": NAME}
    assert half.hand_off(keep(half, "b", [1, 2]), 2 * BLOCK) is None
    assert half_of_role().hand_off(asked, 2 * BLOCK) is None, "it serves nobody"
    assert not wants_name({"kvbm_tell_peer": "yes"})
    assert NAME.startswith("10.0.0.7:5700/")


def test_what_no_tier_here_holds_is_fetched_and_nobody_keeps_a_lease_for_it() -> None:
    half = half_of_role()
    keep(half, "a", [1])  # the first block of the same prompt
    what = request("d", 5, prefix="a", kvbm_peer=NAME, kvbm_peer_tokens=3 * BLOCK)
    plan = load(half, what, [10, 11, 12, 13, 14])
    ticket = Ticket("10.0.0.7", 5700, STANDING_LEASE).encode()
    assert [(item.tier, item.block, item.chunk) for item in plan.loads[0].items] == [
        ("host_dram", 10, None), (PEER, 11, ticket), (PEER, 12, ticket),
    ]  # fmt: skip
    end(half, plan)
    half.finished(what, [[10, 11, 12, 13, 14]], 5 * BLOCK)
    later = half.plan(is_idle=True)
    assert [*plan.watch, *plan.unwatch, *later.watch, *later.unwatch] == []
    counts = half.take_counts()
    assert (counts["hit_blocks", PEER], counts["nixl_peer_hints", ""]) == (2, 1)


def test_a_block_that_the_peer_does_not_hold_any_more_is_computed() -> None:
    half = half_of_role()
    what = request("d", 3, prefix="a", kvbm_peer=NAME, kvbm_peer_tokens=3 * BLOCK)
    plan = load(half, what, [10, 11, 12])
    end(half, plan, {plan.loads[0].job_id: {what.block_hashes[1]: "gone", what.block_hashes[2]: "stale"}})
    assert half.matched_tokens(what, BLOCK) == 0, "it was let down once, so it computes"
    counts = half.take_counts()
    assert [counts["load_failures", reason] for reason in ("gone", "stale")] == [1, 1]
    half.check()


def test_the_gate_refuses_a_peer_that_is_slower_than_computing() -> None:
    gate = LoadGate()
    for _ in range(20):
        gate.observe_prefill(1000, 0.001)
        gate.observe_load(PEER, 1000, 1.0)
    half = half_of_role(gate=gate)
    what = request("d", 3, prefix="a", kvbm_peer=NAME, kvbm_peer_tokens=3 * BLOCK)
    half.new_request(what)
    assert half.matched_tokens(what, 0) == 0
    assert half.take_counts()["refused_blocks", ""] == 3


def test_what_was_computed_for_a_request_goes_before_what_lies_somewhere() -> None:
    prefill = half_of_role(HOLDER)
    ticket = prefill.hand_off(keep(prefill, "a", [1, 2], do_remote_decode=True), 2 * BLOCK)
    assert ticket is not None
    offer, _ = what_peers_have({**ticket, "kvbm_peer": NAME, "kvbm_peer_tokens": 9}, TRUST, "")
    assert offer is not None
    assert offer.is_leased


@pytest.mark.parametrize(
    ("name", "tokens", "said"),
    [
        (NAME[:-1] + ("0" if NAME[-1] != "0" else "1"), 8, UNSIGNED),
        (NAME.replace("10.0.0.7", "10.0.0.8"), 8, UNSIGNED),
        (NAME.replace(":5700/", ":5701/"), 8, UNSIGNED),
        (name_of(HOLDER._replace(secret=b"another")), 8, UNSIGNED),
        ("10.0.0.7:5700", 8, "no name of an engine"),
        ("10.0.0.7:57000000/ab", 8, "no name of an engine"),
        (NAME.replace(":5700/", ":05700/"), 8, "no name of an engine"),
        (NAME.replace(":5700/", ":+5700/"), 8, "no name of an engine"),
        ("somewhere over the rainbow:1/ab", 8, "no name of an engine"),
        ({"host": "10.0.0.7"}, 8, "no name of an engine"),
        (NAME, None, "no number of tokens"),
        (NAME, True, "no number of tokens"),
        (NAME, -1, "no number of tokens"),
        (NAME, 1 << 40, "no number of tokens"),
    ],
)
def test_a_name_that_no_engine_of_the_fleet_has_signed_leads_nowhere(name: Any, tokens: Any, said: str) -> None:
    offer, problem = what_peers_have({"kvbm_peer": name, "kvbm_peer_tokens": tokens}, TRUST, "")
    assert offer is None
    assert said in problem
    assert "\n" not in problem


def test_a_hint_that_cannot_be_used_is_counted_and_computed() -> None:
    half = half_of_role()
    what = request("d", 3, prefix="a", kvbm_peer=NAME[:-8], kvbm_peer_tokens=3 * BLOCK)
    assert half.matched_tokens(what, 0) == 0
    counts = half.take_counts()
    assert counts["nixl_refused_messages", "unsigned_ticket"] == counts["ignored_hints", ""] == 1


def test_an_engine_fetches_nothing_from_itself_and_without_a_secret_nothing_from_other_hosts() -> None:
    hint = {"kvbm_peer": NAME, "kvbm_peer_tokens": 8}
    assert what_peers_have(hint, TRUST, NAME) == (None, "")
    offer, problem = what_peers_have(hint, Trust(b"secret", local_only=True), "")
    assert offer is None
    assert "--kvbm-peer-secret-file" in problem
    assert half_of_role(HOLDER).matched_tokens(request("d", 3, **hint), 0) == 0


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(), max_size=2)


@given(JSON, JSON)
def test_nothing_that_a_client_sends_raises_or_is_believed(name: Any, tokens: Any) -> None:
    offer, problem = what_peers_have({"kvbm_peer": name, "kvbm_peer_tokens": tokens}, TRUST, "")
    assert offer is None
    assert problem
