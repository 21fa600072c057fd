"""The gate against tiers and engines of known speed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_connectors.load_gate import EXPLORE_BLOCKS, EXPLORE_ONE_IN, LEAST_SAMPLES, WINDOW, LoadGate

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


def test_before_anything_is_learnt_everything_is_admitted() -> None:
    gate = LoadGate()
    assert admit(gate, ("disk", 100)) == 100
    teach(gate, "disk", SLOW)
    assert admit(gate, ("disk", 100)) == 100, "nothing is known about prefill"
    other = gate_with_prefill()
    assert admit(other, ("disk", 100)) == 100, "nothing is known about the disk"
    teach(other, "disk", SLOW, samples=LEAST_SAMPLES - 1)
    assert admit(other, ("disk", 100)) == 100, "too little is known about the disk"
    assert admit(other) == 0


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
    assert gate.expected_load_seconds(["object", "dram", "object"], BLOCK_BYTES) == pytest.approx(0.0503, rel=0.01)
    assert admit(gate, ("object", 35), ("dram", 2), ("object", 5)) == 42


@pytest.mark.parametrize("seconds", [0.0, -3.0, 1e9, math.inf, -math.inf, math.nan, 1e-12])
def test_what_cannot_be_measured_is_left_out(seconds: float) -> None:
    gate = gate_with_prefill()
    for _ in range(WINDOW):
        gate.observe_load("disk", BLOCK_BYTES, seconds)
        gate.observe_prefill(1000, seconds)
        gate.observe_load("disk", 0, 0.1)
        gate.observe_prefill(0, 0.1)
    assert gate.expected_load_seconds(["disk"], BLOCK_BYTES) == 0
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
        slower_by = gate.expected_load_seconds(taken, BLOCK_BYTES) - gate.expected_prefill_seconds(
            admitted * BLOCK_TOKENS
        )
        if slower_by > 1e-9:
            explored += 1
            known = gate.expected_load_seconds(taken[:-EXPLORE_BLOCKS], BLOCK_BYTES)
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


def test_a_faster_engine_turns_the_gate() -> None:
    gate = gate_with_prefill(seconds_per_token=1e-3)
    teach(gate, "disk", SLOW)
    assert admit(gate, ("disk", 10)) == 10
    for tokens in (512, 1024, 2048, 4096) * 3:
        gate.observe_prefill(tokens, tokens * 1e-5)
    assert admit(gate, ("disk", 10)) == 0
