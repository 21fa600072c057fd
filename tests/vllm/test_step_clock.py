"""Prefill speed from the times of steps."""

from __future__ import annotations

import pytest

from dynamo_connectors.vllm.step_clock import Prefill, StepClock


def test_a_step_of_prefill_tells_tokens_and_seconds() -> None:
    clock = StepClock()
    clock.planned(10.0, 512, 520)
    assert clock.ended(10.5) == Prefill(520, 0.5)


def test_a_step_planned_while_another_ran_starts_when_that_one_ends() -> None:
    clock = StepClock()
    clock.planned(0.0, 512, 512)
    clock.planned(0.1, 512, 512)
    assert clock.ended(1.0) == Prefill(512, 1.0)
    assert clock.ended(1.5) == Prefill(512, 0.5)


def test_decoding_and_tiny_steps_say_nothing() -> None:
    clock = StepClock()
    clock.planned(0.0, 16, 16)
    clock.planned(0.0, 100, 400)
    clock.planned(0.0, 512, 512)
    assert clock.ended(0.1) is None
    assert clock.ended(0.2) is None
    assert clock.ended(0.2) is None
    assert clock.ended(9.0) is None


def test_a_step_that_may_wait_for_a_load_says_nothing() -> None:
    clock, now = StepClock(), 0.0
    for _ in range(8):
        clock.planned(now, 512, 512)
        clock.may_wait()
        now += 0.5
        assert clock.ended(now) is None
    assert clock.least_seconds == 0.0
    clock.planned(now, 512, 512)
    assert clock.ended(now + 0.5) == Prefill(512, 0.5)


def test_a_step_takes_at_least_what_the_quickest_of_the_last_few_took() -> None:
    clock, now = StepClock(), 0.0
    for number, seconds in enumerate((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)):
        clock.planned(now, 0, 4)
        clock.ended(now := now + seconds)
        assert clock.least_seconds == 0.0, f"{number + 1} steps say nothing yet"
    clock.planned(now, 0, 0)
    clock.ended(now := now + 0.01)
    assert clock.least_seconds == 0.0, "a step that computes nothing says nothing"
    clock.planned(now, 0, 4)
    clock.ended(now := now + 0.8)
    assert clock.least_seconds == pytest.approx(0.1)
    clock.planned(now, 0, 4)
    clock.ended(now + 0.8)
    assert clock.least_seconds == pytest.approx(0.2)
