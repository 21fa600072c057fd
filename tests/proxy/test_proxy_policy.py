"""The routing rules on plain numbers, and the ledger against a plain sum."""

from __future__ import annotations

from random import Random

from dynamo_proxy.ledger import Ledger
from dynamo_proxy.policy import (
    CostModel,
    Load,
    choose_kv,
    choose_least_loaded,
    choose_random,
    choose_round_robin,
    costs_seconds,
)
from hypothesis import given
from hypothesis import strategies as st

MODEL = CostModel()
small = st.integers(0, 50_000)
loads = st.lists(
    st.builds(Load, slot=small, in_flight=st.integers(0, 300), pending_tokens=small, active_tokens=small),
    min_size=1,
    max_size=8,
    unique_by=lambda load: load.slot,
)


def holdings(fleet: list[Load], data: st.DataObject) -> dict[int, int]:
    return {load.slot: data.draw(small) for load in fleet if data.draw(st.booleans())}


def test_the_longest_prefix_wins_among_idle_engines() -> None:
    decision = choose_kv([Load(0), Load(1), Load(2)], {1: 800, 2: 400}, 1000, MODEL, Random(1))
    assert (decision.slot, decision.reason, decision.new_tokens) == (1, "prefix", 200)


def test_a_long_queue_outweighs_a_prefix() -> None:
    decision = choose_kv([Load(0, 20, 100_000, 100_000), Load(1)], {0: 900}, 1000, MODEL, Random(1))
    assert (decision.slot, decision.reason) == (1, "load_over_prefix")


def test_cost_by_hand() -> None:
    decode = 1e-4 * 2 + 3e-8 * 1000
    own = 1e-4 * 900 * (1 + 1 + 0.3 * 2)
    expected = 1e-4 * 500 + own + 1 * (0.01 + decode) + 0.3 * 300 * decode
    assert abs(costs_seconds([Load(0, 2, 500, 1000)], {0: 100}, 1000, MODEL)[0] - expected) < 1e-12


def test_ties_spread() -> None:
    rng = Random(3)
    chosen = {choose_kv([Load(0), Load(1), Load(2)], {}, 100, MODEL, rng).slot for _ in range(60)}
    assert chosen == {0, 1, 2}
    assert {choose_random([Load(0), Load(5)], {}, 1, rng).slot for _ in range(60)} == {0, 5}


def test_round_robin_goes_round_gaps() -> None:
    fleet = [Load(4), Load(0), Load(9)]
    slot, seen = -1, []
    for _ in range(6):
        slot = choose_round_robin(fleet, {}, 1, slot).slot
        seen.append(slot)
    assert seen == [0, 4, 9, 0, 4, 9]


def test_least_loaded_counts_requests_then_pending_tokens() -> None:
    assert choose_least_loaded([Load(0, 2), Load(1, 1, 50), Load(2, 1, 10)], {}, 1, Random(1)).slot == 2


@given(loads, st.integers(0, 50_000), st.data())
def test_the_choice_is_never_dearer_than_another(fleet: list[Load], tokens: int, data: st.DataObject) -> None:
    held = holdings(fleet, data)
    decision = choose_kv(fleet, held, tokens, MODEL, Random(1))
    assert decision.cost_seconds == min(costs_seconds(fleet, held, tokens, MODEL))
    assert 0 <= decision.new_tokens <= tokens


@given(loads, st.integers(1, 50_000), st.integers(0, 50_000), st.integers(1, 1000))
def test_more_cached_is_never_dearer(fleet: list[Load], tokens: int, matched: int, more: int) -> None:
    first, slot = fleet[:1], fleet[0].slot
    better = costs_seconds(first, {slot: matched + more}, tokens, MODEL)
    assert better <= costs_seconds(first, {slot: matched}, tokens, MODEL)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 100), st.sampled_from(["hold", "first", "end"]))))
def test_the_ledger_is_the_sum_of_its_leases(steps: list[tuple[int, int, str]]) -> None:
    ledger = Ledger()
    leases = []
    for slot, tokens, action in steps:
        lease = ledger.charge(slot, tokens, 2 * tokens)
        leases.append(lease)
        if action != "hold":
            ledger.prefilled(lease)
            ledger.prefilled(lease)
        if action == "end":
            ledger.release(lease)
            ledger.release(lease)
        ledger.check()
    for lease in leases:
        ledger.release(lease)
    ledger.check()
    assert ledger.in_flight == 0
    assert all(ledger.load(slot).pending_tokens == ledger.load(slot).active_tokens == 0 for slot in range(4))
