"""The planner's pure cores: step times, queues, capacity, forecast and budget; tables and properties."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from dynamo_planner.budget import Wish, ceilings
from dynamo_planner.capacity import (
    DecodeLoad,
    PrefillLoad,
    batch_at,
    prefill_service,
    replicas_for_decode,
    replicas_for_prefill,
)
from dynamo_planner.forecast import ForecastRule, ForecastState, check_forecast, fold, outlook
from dynamo_planner.queueing import Service, erlang_c, late_share, servers_for, waiting_exceeds
from dynamo_planner.step_model import StepModel, coefficients, learn_step, predict
from hypothesis import given
from hypothesis import strategies as st

PREFILL, DECODE = (0.018, 2.1e-5), (0.005, 1e-4, 0.02)


def learnt(samples: int, seconds: Callable[[float], float], tokens: Callable[[int], float]) -> StepModel:
    model = StepModel()
    for number in range(samples):
        x = tokens(number)
        model = learn_step(model, (1.0, x), seconds(x))
    return model


def test_step_times_are_found_in_noise_with_outliers() -> None:
    source = random.Random(3)

    def noisy(x: float) -> float:
        cold = 20.0 if source.random() < 0.05 else 1.0  # compiled graphs, swapped weights: one in twenty
        return cold * (0.02 + 2e-5 * x) * math.exp(source.gauss(0, 0.1))

    fitted = coefficients(learnt(600, noisy, lambda _: source.uniform(100, 8000)))
    assert fitted is not None
    for tokens in (500.0, 2000.0, 6000.0):
        assert predict(fitted, (1.0, tokens)) == pytest.approx(0.02 + 2e-5 * tokens, rel=0.15)


def test_a_changed_engine_is_learnt_anew() -> None:
    model = learnt(300, lambda x: 0.02 + 2e-5 * x, lambda n: 200.0 + 37 * (n % 100))
    for number in range(600):
        tokens = 200.0 + 37 * (number % 100)
        model = learn_step(model, (1.0, tokens), 3 * (0.02 + 2e-5 * tokens))
    fitted = coefficients(model)
    assert fitted is not None
    assert predict(fitted, (1.0, 2000.0)) == pytest.approx(0.18, rel=0.1)


def test_hours_at_one_load_do_not_wash_out_the_others() -> None:
    model = learnt(200, lambda x: 0.02 + 2e-5 * x, lambda n: 200.0 + 37 * (n % 100))
    for _ in range(500):
        model = learn_step(model, (1.0, 1000.0), 0.04)
    fitted = coefficients(model)
    assert fitted is not None
    assert predict(fitted, (1.0, 3500.0)) == pytest.approx(0.09, rel=0.15)


@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=40))
def test_no_sample_breaks_the_model(samples: list[tuple[float, float]]) -> None:
    model = StepModel()
    for x, seconds in samples:
        model = learn_step(model, (1.0, x), seconds)
    fitted = coefficients(model)
    assert fitted is None or all(value >= 0 and math.isfinite(value) for value in fitted)


def test_queues_against_known_results() -> None:
    assert erlang_c(1, 0.7) == pytest.approx(0.7)
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(10, 8.0) == pytest.approx(0.4092, abs=1e-4)
    assert waiting_exceeds(10, Service(0.05, 1.0), 1, 0.1) == pytest.approx(0.5 * math.exp(-1.0))  # M/M/1


def test_the_m_g_1_tail_is_that_of_a_simulated_queue() -> None:
    """Lindley's recursion with log-normal service: the share beyond the limit, within a third, or a hundredth."""
    source, service, limit = random.Random(5), Service(0.04, 1.5), 0.4
    sigma = math.sqrt(math.log1p(service.cv2))
    for load in (0.6, 0.8, 0.9):
        wait, late, count = 0.0, 0, 60_000
        for _ in range(count):
            own = math.exp(source.gauss(math.log(service.mean_seconds) - sigma**2 / 2, sigma))
            late += wait > limit
            wait = max(0.0, wait + own - source.expovariate(load / service.mean_seconds))
        told = waiting_exceeds(load / service.mean_seconds, service, 1, limit)
        assert told == pytest.approx(late / count, rel=0.34, abs=0.01), load


RATES, SERVICES = st.floats(0, 300), st.builds(Service, st.floats(1e-3, 1.0), st.floats(0, 4))


@given(rate=RATES, more=RATES, service=SERVICES, pooled=st.booleans())
def test_more_arrivals_never_need_fewer_servers(rate: float, more: float, service: Service, pooled: bool) -> None:
    few = servers_for(rate, service, 0.5, 0.95, pooled)
    assert 1 <= few <= servers_for(rate + more, service, 0.5, 0.95, pooled)


@given(rate=RATES, service=SERVICES)
def test_one_shared_queue_never_needs_more_servers(rate: float, service: Service) -> None:
    assert servers_for(rate, service, 0.5, 0.95, True) <= servers_for(rate, service, 0.5, 0.95, False)


@given(rate=st.floats(0.1, 300), service=SERVICES, target=st.floats(0.05, 5))
def test_the_answer_is_on_time_and_minimal(rate: float, service: Service, target: float) -> None:
    count = servers_for(rate, service, target, 0.95, False)
    alone = late_share(0.0, service, 1, target)
    allowed = alone + (1 - alone) * 0.05 + 1e-9
    assert alone >= 1.0 or late_share(rate / count, service, 1, target) <= allowed
    if count > 1:
        fewer = rate / (count - 1)
        assert fewer * service.mean_seconds > 0.92 or late_share(fewer, service, 1, target) > allowed - 1e-6


def test_only_what_grows_with_the_length_spreads_with_it() -> None:
    half = PrefillLoad(rate=1.0, tokens=1000, cv2=1.6)
    assert prefill_service((0.02, 2e-5), half).cv2 == pytest.approx(1.6 / 4)
    assert prefill_service((0.0, 2e-5), half).cv2 == pytest.approx(1.6)
    assert prefill_service((0.02, 0.0), half).cv2 == 0.0
    assert prefill_service((0.0, 0.0), half).mean_seconds == 0.0


def test_full_use_is_not_capacity() -> None:
    """Ten replicas' worth of work needs more than ten: the fault of sizing by rate over capacity."""
    load = PrefillLoad(rate=10 / 0.045, tokens=1286, cv2=1.5)
    assert replicas_for_prefill(PREFILL, load, 0.5, 0.95, pooled=False) >= 13
    assert 11 <= replicas_for_prefill(PREFILL, load, 0.5, 0.95, pooled=True) <= 12


@given(tokens=st.floats(0, 1e5), more=st.floats(0, 1e5), kv=st.floats(0, 0.2))
def test_more_tokens_never_need_fewer_decoders(tokens: float, more: float, kv: float) -> None:
    few = replicas_for_decode(DECODE, DecodeLoad(tokens, kv), 0.05)
    many = replicas_for_decode(DECODE, DecodeLoad(tokens + more, kv), 0.05)
    assert (few is None) == (many is None) or tokens == 0
    assert few is None or many is None or few <= many


def test_decode_is_bound_by_time_kv_or_the_running_limit() -> None:
    load = DecodeLoad(20_000.0)
    by_time = replicas_for_decode(DECODE, load, 0.02)
    assert by_time is not None
    batch = batch_at(DECODE, load, by_time)
    assert 0.005 + 1e-4 * (batch + 2 * math.sqrt(batch)) <= 0.02
    assert batch * by_time == pytest.approx(20_000 * (0.005 + 1e-4 * batch))  # Little's law
    by_kv = replicas_for_decode(DECODE, replace(load, kv_per_request=0.02), 0.02)
    assert by_kv is not None
    assert by_kv > by_time
    assert replicas_for_decode(DECODE, replace(load, max_running=8), 0.02) > by_time  # type: ignore[operator]
    assert replicas_for_decode(DECODE, load, 0.004) is None


RULE = ForecastRule(step_seconds=30, horizon_steps=4)


def fed(rates: list[float], rule: ForecastRule = RULE) -> ForecastState:
    state = ForecastState()
    for number, rate in enumerate(rates):
        state = fold(state, rule, rate, rule.step_seconds, (number + 0.5) * rule.step_seconds)
        check_forecast(state)
    return state


def test_a_steady_rate_is_forecast_as_it_is() -> None:
    seen = outlook(fed([40.0] * 100), RULE)
    assert seen is not None
    assert seen.point == pytest.approx(40, rel=0.01)
    assert seen.upper == pytest.approx(40, rel=0.01)


def test_a_ramp_is_led_and_not_followed() -> None:
    ramp = [20.0 * math.exp(0.02 * number) for number in range(150)]
    seen, due = outlook(fed(ramp), RULE), ramp[-1] * math.exp(0.02 * (RULE.horizon_steps - 1))
    assert seen is not None
    assert seen.point == pytest.approx(due, rel=0.08)
    assert seen.upper >= 0.97 * due


@pytest.mark.parametrize("horizon", [4, 10])
def test_a_rise_is_seen_in_time_however_long_a_start_takes(horizon: int) -> None:
    risen = [20.0] * 20 + [20.0 * math.exp(0.05 * number) for number in range(10)]
    assert fed(risen, replace(RULE, horizon_steps=horizon)).trend > 0.5 * 0.05


@pytest.mark.parametrize("horizon", [4, 12])
@pytest.mark.parametrize("steps", range(1, 6))
def test_a_fleet_that_wakes_is_not_ordered_to_its_limit(horizon: int, steps: int) -> None:
    seen = outlook(fed([0.0] * 20 + [10.0] * steps, replace(RULE, horizon_steps=horizon)), RULE)
    assert seen is not None
    assert seen.lower <= seen.upper <= 1.25 * 10.0 * (1 + 1e-9)


def test_the_first_bound_narrows_on_a_calm_rate_and_widens_on_a_wild_one() -> None:
    first, calm = outlook(fed([40.0] * 2), RULE), outlook(fed([40.0] * 12), RULE)
    wild = outlook(fed([20.0, 60.0] * 6), RULE)
    assert first is not None
    assert calm is not None
    assert wild is not None
    assert first.upper == pytest.approx(1.25 * 40)
    assert 40 < calm.upper < 1.15 * 40
    assert wild.upper > 1.5 * wild.point


def test_the_second_week_knows_the_daily_rise() -> None:
    rule = ForecastRule(step_seconds=600, horizon_steps=2, level_seconds=300)
    source = random.Random(1)
    day = [100.0 if 60 <= k % 144 < 110 else 20.0 for k in range(144 * 8 + 60)]
    noisy = [rate * math.exp(source.gauss(0, 0.03)) for rate in day]
    flat = outlook(fed(noisy, replace(rule, daily=False)), rule)
    seen = outlook(fed(noisy, rule), rule)
    assert seen is not None
    assert flat is not None
    assert seen.point > 40 > flat.point


@pytest.mark.parametrize("horizon", [1, 4])
def test_the_bound_covers_what_it_promises(horizon: int) -> None:
    source, rule = random.Random(2), ForecastRule(step_seconds=30, horizon_steps=horizon)
    rates, level = [], 4.0
    for number in range(3000):
        level += source.gauss(0, 0.02) - 0.01 * (level - 4.0)
        rates.append(math.exp(level + source.gauss(0, 0.05 if number < 1500 else 0.2)))  # the noise grows fourfold
    hits, truths = fed(rates, rule).hits
    assert 0.93 <= hits / truths <= 0.97


def test_an_outage_neither_explodes_nor_forgets() -> None:
    rates = [50.0] * 200 + [0.0] * 40 + [50.0] * 40
    seen = outlook(fed(rates), RULE)
    assert seen is not None
    assert 45 <= seen.point <= 55
    assert seen.upper <= 100.0
    asleep = outlook(fed([50.0] * 50 + [0.0] * 200), RULE)
    assert asleep is not None
    assert asleep.point < 5


@given(
    st.lists(
        st.tuples(st.floats(), st.floats(), st.floats(-1e4, 1e5), st.sampled_from([1, 3, 20])), min_size=1, max_size=60
    )
)
def test_no_history_breaks_the_forecast(looks: list[tuple[float, float, float, int]]) -> None:
    """Absurd rates, clocks that jump, horizons that change: bounded, ordered, finite."""
    state, rule, now = ForecastState(), RULE, 0.0
    for rate, seconds, gap, horizon in looks:
        now += gap
        rule = replace(RULE, horizon_steps=horizon)
        state = fold(state, rule, min(rate, 1e9), seconds, now)
        check_forecast(state)
    seen = outlook(state, rule)
    if seen is not None:
        assert 0 <= seen.lower <= seen.upper < 1e22
        assert math.isfinite(seen.point)


WISHES = st.dictionaries(
    st.sampled_from(["prefill", "decode", "other"]),
    st.builds(Wish, st.integers(0, 20), st.integers(0, 40), st.integers(0, 2), st.sampled_from([1, 2, 8])),
    min_size=1,
)


@given(wishes=WISHES, budget=st.integers(1, 200))
def test_growth_never_passes_the_budget(wishes: dict[str, Wish], budget: int) -> None:
    allowed = ceilings(wishes, budget)
    held = sum(wish.current * wish.gpus for wish in wishes.values())
    after = sum(max(wish.current, allowed[name] or 0) * wish.gpus for name, wish in wishes.items())
    assert after <= max(held, budget)
    for name, wish in wishes.items():
        assert (allowed[name] or 0) <= max(wish.wanted, wish.minimum)


def test_a_short_budget_is_shared_in_proportion() -> None:
    wishes = {"prefill": Wish(1, 10, 1), "decode": Wish(1, 20, 1)}
    assert ceilings(wishes, None) == {"prefill": None, "decode": None}
    assert ceilings(wishes, 15) == {"prefill": 5, "decode": 10}
    # what prefill gives up is decode's only once it is gone
    assert ceilings({"prefill": Wish(8, 4, 1), "decode": Wish(8, 12, 1)}, 16) == {"prefill": 4, "decode": 8}
