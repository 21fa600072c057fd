"""The circuit breaker: both states with every event, and what a dead peer costs over an hour."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_connectors.tiers.circuit import Circuit


def open_circuit() -> Circuit:
    """Opened at 0 with a pause of 1 s, at most 4."""
    circuit = Circuit(errors_to_open=3, retry_seconds=1.0, max_retry_seconds=4.0)
    assert [circuit.note_error(0.0) for _ in range(3)] == [False, False, True]
    assert circuit.is_open
    return circuit


def test_closed_it_admits_everything_and_counts_errors_in_a_row_only() -> None:
    circuit = Circuit(3, 1.0)
    for _ in range(5):
        assert circuit.admits(0.0)
        assert not circuit.note_error(0.0)
        assert not circuit.note_error(0.0)
        assert not circuit.note_success(), "it was closed"
        circuit.check()
    assert not circuit.is_open


@pytest.mark.parametrize(("now", "refuses"), [(0.0, True), (0.9, True), (1.0, False), (99.0, False)])
def test_open_it_refuses_until_the_pause_is_over(now: float, refuses: bool) -> None:
    circuit = open_circuit()
    assert circuit.refuses(now) is refuses
    assert circuit.refuses(now) is refuses, "asking changes nothing"
    assert circuit.admits(now) is not refuses
    circuit.check()


def test_one_probe_passes_and_its_success_closes() -> None:
    circuit = open_circuit()
    assert circuit.admits(1.0)
    assert not circuit.admits(1.0), "one probe at a time"
    assert circuit.note_success()
    assert circuit.admits(1.0)
    assert not circuit.is_open


def test_a_success_of_what_set_out_before_closes_it_too() -> None:
    circuit = open_circuit()
    assert circuit.note_success()
    assert circuit.admits(0.0)


def test_each_failed_probe_doubles_the_pause_up_to_a_bound() -> None:
    circuit, now, pauses = open_circuit(), 0.0, []
    for _ in range(4):
        begin = now
        while not circuit.admits(now):
            now += 0.5
        pauses.append(now - begin)
        assert not circuit.note_error(now)
    assert pauses == [1.0, 2.0, 4.0, 4.0]
    assert circuit.note_success()
    for _ in range(3):
        circuit.note_error(now)
    assert not circuit.admits(now + 0.9)
    assert circuit.admits(now + 1.0), "a success resets the back-off"


def test_without_a_longer_pause_it_stays_the_same() -> None:
    circuit = Circuit(1, 5.0)
    circuit.note_error(0.0)
    for probe in range(1, 5):
        assert not circuit.admits(5.0 * probe - 0.1)
        assert circuit.admits(5.0 * probe)


def test_a_burst_of_errors_counts_once() -> None:
    circuit = open_circuit()
    assert not any(circuit.note_error(0.5) for _ in range(50))
    assert circuit.admits(1.0), "operations that set out before it opened prolong nothing"


def test_a_peer_that_is_dead_for_an_hour_is_asked_a_handful_of_times() -> None:
    circuit, asked = Circuit(3, 1.0, 60.0), 0
    for tenth in range(36_000):
        if circuit.admits(tenth / 10):
            asked += 1
            circuit.note_error(tenth / 10)
    assert asked == 3 + 6 + 58, "three to open it, six while the pause grows to a minute, then one a minute"


@given(st.lists(st.tuples(st.sampled_from(["ask", "good", "bad"]), st.floats(0, 3)), max_size=60))
def test_invariants_hold_in_any_order(events: list[tuple[str, float]]) -> None:
    circuit, now, last_probe = Circuit(2, 1.0, 4.0), 0.0, -1.0
    for event, seconds in events:
        now += seconds
        was_open = circuit.is_open
        if event == "ask":
            if circuit.admits(now) and was_open:
                assert now - last_probe >= 1.0, "probes keep their distance"
                last_probe = now
        elif event == "good":
            assert circuit.note_success() is was_open
            assert not circuit.is_open
        elif circuit.note_error(now):
            assert circuit.is_open
            assert not was_open
        circuit.check()
