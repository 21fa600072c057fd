"""What the cost rule learns: coefficients from first-token and token times, and Dynamo's rule beside ours."""

from __future__ import annotations

from random import Random

from dynamo_proxy.learning import CostLearner
from dynamo_proxy.policy import CostModel, Load, OverlapRule, TierWeights, choose_overlap, credited_blocks, sample
from hypothesis import given
from hypothesis import strategies as st


def test_the_price_of_a_token_and_of_a_pair_is_found_under_noise() -> None:
    learner, rng = CostLearner(), Random(1)
    for _ in range(1500):
        queued, new = rng.randrange(0, 30_000), rng.randrange(300, 20_000)
        prompt = new + rng.randrange(0, 20_000)
        seconds = 0.03 + 8e-5 * (queued + new) + 2e-9 * new * (prompt - new / 2)
        learner.first_token(seconds * rng.uniform(0.8, 1.2), queued, new, prompt)
        learner.check()
    assert abs(learner.model.t_p / 8e-5 - 1) < 0.15
    assert abs(learner.model.t_a / 2e-9 - 1) < 0.5


def test_token_times_and_output_lengths_are_learnt() -> None:
    learner, rng, start = CostLearner(), Random(2), CostModel()
    for _ in range(1000):
        in_flight, active = rng.randrange(1, 60), rng.randrange(1000, 400_000)
        each = 0.008 + 3 * (start.t_d * in_flight + start.t_k * active)
        beside = rng.choice([0.0, 0.3])
        learner.stream_ended(each * 99 + beside, 100, Load(0, in_flight, 0, active), beside)
    model = learner.model
    assert abs(model.t_0 / 0.008 - 1) < 0.1
    assert abs(model.t_d / start.t_d / 3 - 1) < 0.1
    assert abs(model.t_k / start.t_k / 3 - 1) < 0.1
    assert abs(model.expected_output_tokens - 100) < 1
    learner.check()


def test_the_worth_of_what_a_peer_holds_is_learnt_and_never_when_it_is_to_count_for_nothing() -> None:
    model, rng = CostModel(), Random(3)
    for share, least, most in ((0.1, 0.85, 0.95), (0.6, 0.3, 0.5), (1.0, 0.0, 0.1), (3.0, 0.0, 0.0)):
        learner, never = CostLearner(), CostLearner()
        learner.expect_of_peers(0.25)
        for _ in range(200):
            queued, new = rng.randrange(0, 20_000), rng.randrange(1000, 20_000)
            peer = rng.randrange(256, new)
            read = model.t_0 + model.t_p * (queued + new - peer + share * peer)
            for each in (learner, never):
                each.fetched(read * rng.uniform(0.95, 1.05), queued, new, peer, new + 100)
                each.check()
        assert least <= learner.peer_worth <= most, share
        assert never.peer_worth == 0


observations = st.lists(
    st.tuples(st.floats(-1, 1e6), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6)), max_size=80
)


@given(observations)
def test_no_observation_breaks_the_model(seen: list[tuple[float, int, int, int]]) -> None:
    learner = CostLearner()
    learner.expect_of_peers(0.25)
    for seconds, first, second, third in seen:
        learner.first_token(seconds, first, second, second + third)
        learner.fetched(seconds, first, second, third, second + third)
        learner.stream_ended(seconds, first, Load(0, second, 0, third), first)
        learner.check()
    model = learner.model
    assert 0 < model.t_p <= 0.1
    assert 0 <= model.t_a <= 1e-5
    assert min(model.t_0, model.t_d, model.t_k) >= 0


def test_a_load_that_never_varies_teaches_and_harms_nothing() -> None:
    learner = CostLearner()
    for _ in range(20_000):
        learner.first_token(0.1 + 1000 * 1e-4, 0, 1000, 1000)
        learner.stream_ended(1.0, 101, Load(0, 4, 0, 4000), 0)
    learner.check()
    learner.first_token(30.0, 0, 1000, 1000)
    learner.check()
    assert 1e-5 < learner.model.t_p < 1e-2


def test_dynamos_rule_by_hand() -> None:
    fleet = [Load(0, 1, 160, 320), Load(1, 0, 0, 0)]
    decision = choose_overlap(fleet, {0: 1600}, 1600, OverlapRule(1.0, 0.0, 16), Random(1))
    assert (decision.slot, decision.cost_seconds) == (0, 10 + 20)  # engine 1 would cost 100 blocks
    assert choose_overlap(fleet, {0: 1600}, 1600, OverlapRule(0.0, 0.0, 16), Random(1)).slot == 1


def test_temperature_spreads_and_zero_does_not() -> None:
    rng = Random(5)
    drawn = [sample([1.0, 2.0, 9.0], 0.5, rng) for _ in range(400)]
    assert drawn.count(0) > drawn.count(1) > drawn.count(2) > 0
    assert {sample([1.0, 2.0, 9.0], 0.0, rng) for _ in range(50)} == {0}
    assert {sample([1.0, 1.0], 0.7, rng) for _ in range(50)} == {0, 1}


def test_blocks_below_hbm_count_for_what_they_are_worth() -> None:
    assert credited_blocks((4, 4, 4, 4), TierWeights()) == 4
    assert credited_blocks((0, 4, 4, 8), TierWeights(0.5, 0.25, 0.1)) == 2.4
    assert credited_blocks((1, 2, 3, 4), TierWeights(0.5, 0.25, 0.1)) == 1.85
