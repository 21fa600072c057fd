"""The gate against tiers and engines of known speed."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from dynamo_connectors.load_gate import (
    DOUBT,
    EXPLORE_BLOCKS,
    EXPLORE_ONE_IN,
    EXPLORE_YOUNG_ONE_IN,
    LEAST_SAMPLES,
    WINDOW,
    LoadGate,
)

BLOCK_BYTES, BLOCK_TOKENS = 2_000_000, 16
PREFILL = 1e-4  # seconds a token: a block takes 1.6 ms
FAST, SLOW = 20e9, 0.2e9  # bytes a second: a block takes 0.1 ms, or 10 ms
speeds = st.floats(1e7, 1e12)
latencies = st.floats(0, 0.1)
noise = st.floats(0.9, 1.1)


def gate_with_prefill(seconds_per_token: float = PREFILL) -> LoadGate:
    gate = LoadGate()
    for tokens in (512, 1024, 2048, 4096):
        gate.observe_prefill(tokens, 0.005 + tokens * seconds_per_token)
    return gate


def teach(gate: LoadGate, tier: str, bytes_per_second: float, latency: float = 0.0, samples: int = WINDOW) -> None:
    for number in range(samples):
        size = BLOCK_BYTES * (1 << number % 5)
        gate.observe_load(tier, size, latency + size / bytes_per_second)


def admit(gate: LoadGate, *run: tuple[str, int]) -> int:
    return gate.admit([tier for tier, blocks in run for _ in range(blocks)], BLOCK_BYTES, BLOCK_TOKENS)


def expected_load_seconds(gate: LoadGate, run: list[str]) -> float:
    """A tier met twice is waited for once; tiers that nothing is known of count as free."""
    return sum(gate.expected_load_seconds(tier, run.count(tier) * BLOCK_BYTES) or 0.0 for tier in dict.fromkeys(run))


def test_before_anything_is_learnt_everything_is_admitted() -> None:
    gate = LoadGate()
    assert admit(gate, ("disk", 100)) == 100
    teach(gate, "disk", SLOW)
    assert admit(gate, ("disk", 100)) == 100, "nothing is known about prefill"
    other = gate_with_prefill()
    assert admit(other, ("disk", 100)) == 100, "nothing is known about the disk"
    assert admit(other) == 0


def test_one_load_that_took_clearly_longer_than_computing_is_the_last() -> None:
    gate = LoadGate()
    gate.observe_prefill(2048, 2048 * PREFILL)
    gate.observe_load("disk", 100 * BLOCK_BYTES, 100 * BLOCK_BYTES / SLOW)
    assert admit(gate, ("disk", 100)) == 0
    assert admit(gate, ("disk", 10)) == 0
    # Ten times as much may take no longer: the one sample may have been all latency.
    assert admit(gate, ("disk", 1000)) == 1000


def test_a_tier_measured_at_start_up_is_refused_before_its_first_load() -> None:
    gate = gate_with_prefill()
    gate.expect_load("disk", SLOW)
    assert admit(gate, ("disk", 100)) == 0
    gate.expect_load("fast", FAST)
    assert admit(gate, ("fast", 100)) == 100
    nothing = gate_with_prefill()
    for wrong in (0.0, -1.0, math.inf, math.nan):
        nothing.expect_load("disk", wrong)
    assert admit(nothing, ("disk", 100)) == 100


def test_a_first_load_that_was_slow_by_accident_is_doubted_soon() -> None:
    """Kernels are compiled in it, for example."""
    gate = gate_with_prefill()
    gate.observe_load("dram", 8 * BLOCK_BYTES, 1.0)
    asked = 0
    while (admitted := admit(gate, ("dram", 8))) < 8:
        if admitted:
            gate.observe_load("dram", admitted * BLOCK_BYTES, admitted * BLOCK_BYTES / FAST)
        asked += 1
        assert asked <= EXPLORE_YOUNG_ONE_IN


@given(
    speed=st.floats(2e7, 1e12),  # below it a load takes 600 s, which the gate takes for a wrong report
    factors=st.lists(noise, min_size=1, max_size=6),
    blocks=st.integers(1, 3000),
    probed=st.booleans(),
)
def test_from_the_second_load_on_none_is_clearly_slower_than_computing(
    speed: float, factors: list[float], blocks: int, probed: bool
) -> None:
    """With a measurement at start-up from the first one on. Loads of one size; the tries of a few blocks are apart."""
    gate = gate_with_prefill()
    if probed:
        gate.expect_load("disk", speed)
    computing = blocks * BLOCK_TOKENS * PREFILL
    slower = []
    for factor in factors:
        admitted = admit(gate, ("disk", blocks))
        if admitted == blocks > EXPLORE_BLOCKS:
            seconds = blocks * BLOCK_BYTES / speed * factor
            gate.observe_load("disk", blocks * BLOCK_BYTES, seconds)
            # Noise of a tenth in either direction on top of the doubt.
            slower.append(seconds > DOUBT * computing * 1.25)
        gate.check()
    assert not any(slower if probed else slower[1:])


@given(speed=speeds, blocks=st.integers(1, 3000), samples=st.integers(0, LEAST_SAMPLES))
def test_what_is_clearly_faster_is_admitted_from_the_first_load_on(speed: float, blocks: int, samples: int) -> None:
    gate = gate_with_prefill()
    gate.expect_load("disk", speed)
    teach(gate, "disk", speed, samples=samples)
    if 1.1 * blocks * BLOCK_BYTES / speed < blocks * BLOCK_TOKENS * PREFILL:
        assert admit(gate, ("disk", blocks)) == blocks


def test_a_faster_tier_is_read_and_a_slower_one_computed() -> None:
    gate = gate_with_prefill()
    teach(gate, "dram", FAST)
    teach(gate, "disk", SLOW)
    assert admit(gate, ("dram", 10)) == 10
    assert admit(gate, ("disk", 10)) == 0
    assert admit(gate, ("dram", 10), ("disk", 10)) == 10
    assert admit(gate, ("disk", 1), ("dram", 50)) == 51, "one slow block opens the way to many fast ones"
    assert admit(gate, ("disk", 50), ("dram", 1)) == 0


def test_a_latency_is_worth_it_for_many_blocks_only() -> None:
    gate = gate_with_prefill()
    teach(gate, "object", FAST, latency=0.05)
    assert admit(gate, ("object", 10)) == 0
    assert admit(gate, ("object", 100)) == 100


def test_a_tier_met_twice_is_waited_for_once() -> None:
    gate = gate_with_prefill()
    teach(gate, "object", FAST, latency=0.05)
    teach(gate, "dram", FAST)
    assert expected_load_seconds(gate, ["object", "dram", "object"]) == pytest.approx(0.0503, rel=0.01)
    assert admit(gate, ("object", 35), ("dram", 2), ("object", 5)) == 42


@pytest.mark.parametrize("seconds", [0.0, -3.0, 1e9, math.inf, -math.inf, math.nan, 1e-12])
def test_what_cannot_be_measured_is_left_out(seconds: float) -> None:
    gate = gate_with_prefill()
    for _ in range(WINDOW):
        gate.observe_load("disk", BLOCK_BYTES, seconds)
        gate.observe_prefill(1000, seconds)
        gate.observe_load("disk", 0, 0.1)
        gate.observe_prefill(0, 0.1)
    assert expected_load_seconds(gate, ["disk"]) == 0
    assert gate.expected_prefill_seconds(1000) == pytest.approx(1000 * PREFILL)


@given(absurd=st.lists(st.floats(1e-6, 500), max_size=WINDOW // 2 - 1))
def test_a_few_absurd_samples_turn_nothing(absurd: list[float]) -> None:
    gate = gate_with_prefill()
    teach(gate, "dram", FAST)
    for seconds in absurd:
        gate.observe_load("dram", 4 * BLOCK_BYTES, seconds)
    assert admit(gate, ("dram", 64)) == 64


@given(
    speed=speeds,
    latency=latencies,
    factors=st.lists(noise, min_size=WINDOW, max_size=WINDOW),
    blocks=st.integers(1, 16),
)
def test_a_load_that_is_clearly_faster_is_never_refused(
    speed: float, latency: float, factors: list[float], blocks: int
) -> None:
    gate = gate_with_prefill()
    for number, factor in enumerate(factors):
        size = BLOCK_BYTES * (1 << number % 5)
        gate.observe_load("disk", size, (latency + size / speed) * factor)
    if 2 * (latency + blocks * BLOCK_BYTES / speed) < blocks * BLOCK_TOKENS * PREFILL:
        assert admit(gate, ("disk", blocks)) == blocks


tiers = st.sampled_from(["dram", "disk", "object"])


@given(
    lines=st.dictionaries(tiers, st.tuples(speeds, latencies)),
    runs=st.lists(st.lists(st.tuples(tiers, st.integers(1, 20)), max_size=4), min_size=1, max_size=60),
)
def test_what_is_expected_to_be_slower_is_admitted_only_to_explore(
    lines: dict[str, tuple[float, float]], runs: list[list[tuple[str, int]]]
) -> None:
    gate = gate_with_prefill()
    for tier, (speed, latency) in lines.items():
        teach(gate, tier, speed, latency)
    explored = 0
    for run in runs:
        admitted = admit(gate, *run)
        taken = [tier for tier, blocks in run for _ in range(blocks)][:admitted]
        slower_by = expected_load_seconds(gate, taken) - gate.expected_prefill_seconds(admitted * BLOCK_TOKENS)
        if slower_by > 1e-9:
            explored += 1
            known = expected_load_seconds(gate, taken[:-EXPLORE_BLOCKS])
            assert known <= gate.expected_prefill_seconds(max(0, admitted - EXPLORE_BLOCKS) * BLOCK_TOKENS) + 1e-9
        gate.check()
    assert explored <= len(runs) // EXPLORE_ONE_IN * 3, "three tiers were refused and tried too often"


@given(slowdown=st.floats(10, 10_000), slow_samples=st.integers(WINDOW, 200))
def test_it_recovers_after_a_slow_spell(slowdown: float, slow_samples: int) -> None:
    gate = gate_with_prefill()
    teach(gate, "disk", FAST)
    for _ in range(slow_samples):
        gate.observe_load("disk", 8 * BLOCK_BYTES, min(500.0, 8 * BLOCK_BYTES / FAST * slowdown * 10))
    assert admit(gate, ("disk", 32)) == 0
    asked = 0
    while (admitted := admit(gate, ("disk", 32))) < 32:
        assert admitted in (0, EXPLORE_BLOCKS)
        if admitted:
            gate.observe_load("disk", admitted * BLOCK_BYTES, admitted * BLOCK_BYTES / FAST)
        asked += 1
        assert asked <= EXPLORE_ONE_IN * WINDOW, "the tier is fast again and nobody sees it"


@given(
    speed=st.floats(2e9, 1e12),
    latency=st.floats(0.01, 0.3),
    small=st.integers(1, 16),
    samples=st.integers(0, 60),
    blocks=st.integers(200, 3000),
)
@example(speed=4e9, latency=0.05, small=4, samples=60, blocks=1000)
def test_many_blocks_are_let_through_though_all_before_were_few(
    speed: float, latency: float, small: int, samples: int, blocks: int
) -> None:
    """Of loads of one size nobody can tell a latency from a rate; tries that grow can."""
    assume(1.5 * (latency + blocks * BLOCK_BYTES / speed) < blocks * BLOCK_TOKENS * PREFILL)
    gate = gate_with_prefill()

    def load(run: int) -> int:
        if admitted := admit(gate, ("object", run)):
            gate.observe_load("object", admitted * BLOCK_BYTES, latency + admitted * BLOCK_BYTES / speed)
        gate.check()
        return admitted

    for _ in range(samples):
        load(small)
    assert any(load(blocks) == blocks for _ in range(EXPLORE_ONE_IN * 6)), "refused for ever"


def test_a_faster_engine_turns_the_gate() -> None:
    gate = gate_with_prefill(seconds_per_token=1e-3)
    teach(gate, "disk", SLOW)
    assert admit(gate, ("disk", 10)) == 10
    for tokens in (512, 1024, 2048, 4096) * 3:
        gate.observe_prefill(tokens, tokens * 1e-5)
    assert admit(gate, ("disk", 10)) == 0
