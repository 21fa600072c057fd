"""The pure rules: tables of cases, and invariants that hold for every fleet."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from dynamo_planner.decision import decide
from dynamo_planner.decision_log import Chain, encode, replay
from dynamo_planner.queueing import Service, waiting_exceeds
from dynamo_planner.records import (
    Decision,
    DecisionInputs,
    Delta,
    EngineObservation,
    FleetObservation,
    Memory,
    ProxyObservation,
    SizingPolicy,
)
from dynamo_planner.step_model import StepModel, coefficients, learn_step
from hypothesis import given, settings
from hypothesis import strategies as st

POLICY = SizingPolicy(max_replicas=8, stabilisation_seconds=100.0)


def engine(number: int = 0, **values: object) -> EngineObservation:
    base = EngineObservation(f"http://e{number}", "ready", age_seconds=999, running=1, waiting=0, kv_usage=0.3)
    return replace(base, **values)  # type: ignore[arg-type]


def fleet(*engines: EngineObservation, now: float = 1000.0, proxy: ProxyObservation | None = None) -> FleetObservation:
    return FleetObservation(now, engines, proxy)


def once(seen: FleetObservation, policy: SizingPolicy = POLICY, memory: Memory | None = None) -> Decision:
    return decide(DecisionInputs(seen, policy, memory or Memory()))


@pytest.mark.parametrize(
    ("engines", "desired", "reason"),
    [
        ([engine()], 1, "steady"),
        ([engine(kv_usage=0.95)], 2, "kv_pressure"),
        ([engine(waiting=5, running=8)], 2, "queue"),
        (
            [engine(waiting=40, running=8)],
            6,
            "queue",
        ),  # 48 requests, 8 at once per engine: a jump, not a step
        ([engine(waiting=400, running=8)], 8, "queue"),
        ([engine(waiting=9, running=0)], 2, "queue"),
        ([engine(running=0, kv_usage=0.0)], 1, "steady"),  # zero traffic is a valid observation
        ([engine(kv_usage=None)], 1, "steady"),
        ([engine(stale_reason="timeout")], 1, "stale"),
        ([engine(), engine(1, stale_reason="timeout")], 2, "stale"),
        ([engine(kv_usage=0.95, waiting=9, running=3), engine(1, stale_reason="timeout")], 5, "queue"),
        ([engine(running=math.nan)], 1, "stale"),
        ([engine(), engine(1, state="down")], 1, "steady"),
        ([engine(kv_usage=0.95), engine(1, state="starting")], 2, "steady"),  # help is on its way
        ([engine(kv_usage=0.9), engine(1, state="draining")], 2, "kv_pressure"),
        ([engine(state="starting")], 1, "no_ready_engine"),
        ([], 1, "below_min"),
        ([engine(number) for number in range(9)], 8, "above_max"),
        ([engine(number, kv_usage=0.9) for number in range(8)], 8, "at_max"),
    ],
)
def test_load_rule(engines: list[EngineObservation], desired: int, reason: str) -> None:
    decision = once(fleet(*engines))
    assert (decision.desired, decision.reason) == (desired, reason), decision.explanation


def test_running_limit_is_a_signal_of_its_own() -> None:
    decision = once(fleet(engine(running=30)), replace(POLICY, max_running_per_replica=8.0))
    assert (decision.desired, decision.reason) == (4, "running")
    assert "30 running against 8 per replica" in decision.explanation


def test_scale_down_waits_for_the_whole_window_and_then_halves_at_most_every_minute() -> None:
    memory, log, count = Memory(), [], 8
    for tick in range(26):
        seen = fleet(*(engine(number, kv_usage=0.05) for number in range(count)), now=10.0 * tick)
        decision = once(seen, memory=memory)
        memory = decision.memory
        log.append((decision.desired, decision.reason))
        count = decision.desired if tick != 10 else count  # the actuator was busy at first
    assert log[:10] == [(8, "stabilising")] * 10
    assert log[10:12] == [(4, "idle_window")] * 2, "what was not done is said again"
    assert log[12:18] == [(4, "rate_limited")] * 6, "a minute from the tick that saw it done"
    assert log[18] == (2, "idle_window")
    assert log[25] == (1, "idle_window")


def test_what_was_ordered_is_not_taken_back_before_it_has_come() -> None:
    """However short the window: what asked for it may be still only because it is on its way."""
    policy = replace(POLICY, stabilisation_seconds=0.0)
    coming = fleet(engine(kv_usage=0.1), engine(1, kv_usage=0.1), engine(2, state="starting"))
    assert (once(coming, policy).desired, once(coming, policy).reason) == (3, "stabilising")
    assert once(fleet(engine(kv_usage=0.1), engine(1, kv_usage=0.1)), policy).desired == 1


def test_only_as_many_stay_as_the_window_ever_needed() -> None:
    memory = Memory(since_seconds=0.0, needs=((950.0, 5), (990.0, 2)))
    busy = fleet(*(engine(number, kv_usage=0.05) for number in range(8)), now=1000.0)
    assert once(busy, memory=memory).desired == 5


@pytest.mark.parametrize("spoiler", [{"kv_usage": 0.7}, {"stale_reason": "timeout"}])
def test_one_busy_or_unread_moment_restarts_the_wait(spoiler: dict[str, object]) -> None:
    memory, downs = Memory(), []
    for tick in range(30):
        bad = spoiler if tick == 9 else {}
        seen = fleet(*(engine(number, **({"kv_usage": 0.1} | bad)) for number in range(2)), now=10.0 * tick)
        decision = once(seen, memory=memory)
        memory = decision.memory
        if decision.direction == "down":
            downs.append(tick)
    assert downs[0] == 20, "the moment at 90 s must have left the 100 s window"


def test_a_manual_order_obeys_bounds_and_restarts_the_window() -> None:
    old = Memory(since_seconds=0.0, needs=((950.0, 1),))
    decision = decide(DecisionInputs(fleet(engine(), engine(1)), POLICY, old, order=99))
    assert (decision.desired, decision.reason) == (8, "manual")
    assert decision.memory.since_seconds == 1000.0


SLA = SizingPolicy(target="sla", max_replicas=20, ttft_seconds=0.5, itl_seconds=0.05, stabilisation_seconds=100.0)


def taught(rate: float | None = None) -> Memory:
    """20 ms + 20 us per token of prefill; ITL of 10 ms + 1 ms per running request."""
    memory = Memory(arrival_rate=rate)
    for step in range(40):
        tokens, batch = 500.0 + 50 * step, 4.0 + step
        prefill = learn_step(memory.prefill, (1.0, tokens), 0.02 + 2e-5 * tokens)
        decode = learn_step(memory.decode, (1.0, batch, 0.0), 0.01 + 1e-3 * batch)
        memory = replace(memory, prefill=prefill, decode=decode)
    return memory


def test_the_line_is_found_again() -> None:
    assert coefficients(taught().prefill) == pytest.approx((0.02, 2e-5), rel=0.1)
    assert coefficients(taught().decode) == pytest.approx((0.01, 1e-3, 0.0), rel=0.1)
    assert coefficients(Memory().decode) is None


def test_sla_sizes_for_waiting_time_not_for_full_use() -> None:
    proxy = ProxyObservation(interval_seconds=10, arrivals=300, prompt_tokens=300 * 1000)
    decision = once(fleet(engine(), proxy=proxy), SLA, taught())
    # 30 requests/s x 40 ms = 1.2 servers' worth of work: two would be enough at full use
    assert decision.reason == "ttft"
    assert 2 <= decision.desired <= 4
    assert waiting_exceeds(30 / decision.desired, Service(0.04, 1.6), 1, 0.46) <= 0.05


def test_a_burst_orders_what_also_clears_the_queue_that_grows_until_help_comes() -> None:
    """60/s x 40 ms are 2.4 replicas' work and one is there: in 70 s some 2,100 requests will wait, and then 30 s long
    70/s more must be served. Those on their way are counted, so that the next look orders nothing more.
    """
    proxy = ProxyObservation(interval_seconds=10, arrivals=600, prompt_tokens=600 * 1000)
    first = once(fleet(engine(), proxy=proxy), SLA, taught())
    assert (first.desired, first.reason) == (6, "ttft"), first.explanation
    helped = [engine(waiting=300.0), *(engine(number, state="starting") for number in range(1, 6))]
    assert once(fleet(*helped, proxy=proxy), SLA, first.memory).desired == 6


def seen_rate(memory: Memory, policy: SizingPolicy, second: float, rate: int) -> Decision:
    proxy = ProxyObservation(interval_seconds=10, arrivals=10 * rate, prompt_tokens=10 * rate * 1000)
    return once(fleet(engine(), now=1000.0 + second, proxy=proxy), policy, memory)


def test_room_for_a_burst_is_a_multiple_of_the_usual_load_and_not_of_the_burst() -> None:
    """10/s x 40 ms are 0.4 replicas' work: one is enough, and for five times as much, 2.0 at full use, three."""
    policy, memory = replace(SLA, burst_factor=5.0), taught()
    for tick in range(60):
        calm = seen_rate(memory, policy, 10.0 * tick, 10)
        memory = calm.memory
    assert (calm.need_up, calm.reason) == (3, "burst"), calm.explanation
    assert seen_rate(memory, SLA, 600.0, 10).need_up == 1
    for tick in range(60, 90):
        memory = seen_rate(memory, policy, 10.0 * tick, 50).memory
    assert memory.usual_rate == pytest.approx(10.0 * math.exp(300 / 1800), rel=0.01)
    assert seen_rate(memory, policy, 900.0, 0).memory.usual_rate == memory.usual_rate, "no traffic teaches nothing"


def test_a_decode_pool_keeps_room_for_a_burst_too() -> None:
    policy = replace(SLA, role="decode", ttft_seconds=None)
    memory = replace(taught(), output_tokens=200.0, usual_rate=10.0, usual_seconds=600.0)
    assert (
        seen_rate(memory, policy, 0.0, 10).need_up
        < seen_rate(memory, replace(policy, burst_factor=5.0), 0.0, 10).need_up
    )


def test_cold_engines_teach_nothing_about_step_times() -> None:
    cold = engine(
        age_seconds=5.0, ttft=Delta(90.0, 10, 0.0), prompt_tokens=1e4, itl=Delta(9.0, 100), interval_seconds=10
    )
    assert once(fleet(cold), SLA).memory.prefill == once(fleet(cold), SLA).memory.decode == StepModel()
    learnt = once(fleet(replace(cold, age_seconds=31.0)), SLA).memory
    assert learnt.prefill.points
    assert learnt.decode.points


def test_a_decode_pool_counts_what_waits_for_its_prefill() -> None:
    policy = replace(SLA, role="decode", ttft_seconds=None)
    memory = replace(taught(), output_tokens=200.0)
    proxy = ProxyObservation(interval_seconds=10, arrivals=100, prompt_tokens=100 * 1000)
    calm = once(fleet(engine(running=20), proxy=replace(proxy, in_flight=20)), policy, memory)
    piled = once(fleet(engine(running=20), proxy=replace(proxy, in_flight=920)), policy, memory)
    assert piled.need_up > calm.need_up, (piled.explanation, calm.explanation)
    full = once(fleet(engine(running=20, waiting=900.0)), policy, replace(memory, arrival_rate=10.0))
    assert full.need_up == piled.need_up, "what queues at the decoders themselves counts as well"


def test_a_queue_that_grows_is_counted_as_long_as_it_will_be_when_help_has_come() -> None:
    """100 wait after 10 s in which none waited before: 8/s more by any chance, for 70 s."""
    policy = replace(SLA, role="decode", ttft_seconds=None)
    memory = replace(taught(), output_tokens=200.0, pending=0.0)
    proxy = ProxyObservation(interval_seconds=10, arrivals=100, prompt_tokens=100 * 1000, in_flight=120)
    grown = once(fleet(engine(running=20), proxy=proxy), policy, memory)
    assert grown.memory.pending_growth == pytest.approx(8.0)
    stands = once(fleet(engine(running=20), proxy=proxy), policy, replace(memory, pending=100.0))
    assert grown.need_up > stands.need_up, (grown.explanation, stands.explanation)
    helped = once(fleet(engine(running=20), engine(1, state="starting"), proxy=proxy), policy, memory)
    assert helped.need_up == stands.need_up, "nobody knows how long it grows while help is on its way"


def test_sla_doubles_at_most_for_a_missed_target_and_not_while_help_comes() -> None:
    slow = engine(ttft=Delta(50.0, 10), prompt_tokens=100, interval_seconds=10)
    assert once(fleet(slow), SLA).desired == 2
    assert once(fleet(slow, engine(1, state="starting")), SLA).desired == 2
    assert once(fleet(slow, engine(1, age_seconds=1)), SLA).desired == 2


def test_sla_itl_gives_nothing_up_that_the_line_says_is_needed() -> None:
    busy = [engine(number, running=30, itl=Delta(4.0, 100), interval_seconds=10) for number in range(3)]
    decision = once(fleet(*busy), SLA, taught())
    assert decision.need_down >= 3
    late = [engine(number, running=60, itl=Delta(7.0, 100), interval_seconds=10) for number in range(2)]
    assert once(fleet(*late), SLA, taught()).desired == 3


def test_sla_without_traffic_comes_down_to_the_minimum_after_the_window() -> None:
    memory = Memory(since_seconds=0.0)
    idle = [engine(number, running=0, ttft=Delta(0, 0), itl=Delta(0, 0), interval_seconds=10) for number in range(2)]
    assert once(fleet(*idle), SLA, memory).desired == 1


NUMBER = st.none() | st.floats() | st.floats(0, 1e4)
DELTAS = st.none() | st.builds(Delta, st.floats(), st.floats())
ENGINES = st.lists(
    st.builds(
        EngineObservation,
        url=st.sampled_from(["http://a", "http://b"]),
        state=st.sampled_from(["ready", "starting", "draining", "down"]),
        stale_reason=st.sampled_from(["", "", "timeout"]),
        age_seconds=st.floats(0, 1e4),
        interval_seconds=st.floats(0, 1e3),
        running=NUMBER,
        waiting=NUMBER,
        kv_usage=NUMBER,
        prompt_tokens=NUMBER,
        ttft=DELTAS,
        itl=DELTAS,
        queue_wait=DELTAS,
    ),
    max_size=6,
)
PROXIES = st.none() | st.builds(ProxyObservation, st.just(""), st.floats(), NUMBER, NUMBER)


@settings(max_examples=300, deadline=None)
@given(
    looks=st.lists(st.tuples(st.floats(0.1, 200), ENGINES, PROXIES), min_size=1, max_size=8),
    policy=st.sampled_from([POLICY, SLA, replace(SLA, min_replicas=2, max_replicas=3)]),
)
def test_invariants_of_any_history(
    looks: list[tuple[float, list[EngineObservation], ProxyObservation | None]], policy: SizingPolicy
) -> None:
    """Never raises; inside the bounds whenever it moves; never down on stale numbers or inside the window."""
    memory, now, first = Memory(), 0.0, None
    for gap, engines, proxy in looks:
        now += gap
        first = now if first is None else first
        decision = decide(DecisionInputs(FleetObservation(now, tuple(engines), proxy), policy, memory))
        memory = decision.memory
        assert decision.explanation
        assert decision.explanation.count("\n") == 0
        if decision.direction != "hold":
            assert policy.min_replicas <= decision.desired <= policy.max_replicas or decision.reason == "idle_window"
        if decision.direction == "down":
            assert not any(engine.state == "ready" and engine.stale for engine in engines)
        if decision.reason == "idle_window":
            assert decision.current // 2 <= decision.desired < decision.current
            assert decision.desired >= policy.min_replicas
            assert now - first >= policy.stabilisation_seconds
            assert all(need <= decision.desired for _, need in memory.needs)


def test_a_log_replays_and_a_changed_rule_shows() -> None:
    memory, lines, chain = Memory(), ['{"kind": "observation_failure"}'], Chain(whole_every=8)
    for tick in range(30):
        seen = fleet(
            engine(
                kv_usage=0.1 + 0.03 * tick,
                ttft=Delta(0.1 * tick, tick),
                prompt_tokens=31.7 * tick,
                itl=Delta(0.3, 7),
            ),
            engine(1, stale_reason="timeout" if tick % 7 == 3 else ""),
            now=tick / 3,
            proxy=ProxyObservation(interval_seconds=1 / 3, arrivals=tick, prompt_tokens=100.1),
        )
        decision = once(seen, SLA if tick % 2 else POLICY, memory)
        memory = decision.memory
        lines.append(encode({"kind": "decision", "decision": chain.entry(decision)}))
    assert replay(lines).decisions == 30
    assert replay(lines).differences == ()
    assert sum('"memory"' in line for line in lines) == 4  # the start, and every eighth
    lines[5] = lines[5].replace('"desired":2', '"desired":3')
    assert len(replay(lines).differences) == 1
    assert replay(lines).differences[0].startswith("line 6: was 3")


def test_nothing_is_started_before_the_proxy_has_told_the_fleet() -> None:
    """A planner that restarts while its proxy is away sees no engine: that is not an empty fleet."""
    unknown = replace(fleet(), is_complete=False)
    said = once(unknown, SizingPolicy(min_replicas=2))
    assert (said.current, said.desired, said.reason) == (0, 0, "fleet_unknown")
    assert once(fleet(), SizingPolicy(min_replicas=2)).desired == 2
