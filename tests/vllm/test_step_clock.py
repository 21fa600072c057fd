"""Prefill speed from the times of steps."""

from __future__ import annotations

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
