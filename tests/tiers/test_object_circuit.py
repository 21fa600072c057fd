"""The circuit breaker: every state with every event, and what a dead store costs over an hour."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_connectors.tiers.object_circuit import Circuit, CircuitState

CLOSED, OPEN, PROBING = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.PROBING


def circuit_in(state: CircuitState) -> Circuit:
    """Opened at 0 with a pause of 1 s, unless CLOSED; one failure short of opening if so."""
    circuit = Circuit(max_failures=3, first_pause_seconds=1.0, max_pause_seconds=4.0)
    for _ in range(2 if state is CLOSED else 3):
        circuit.failed(0.0)
    if state is PROBING:
        assert circuit.allow(1.0)
    assert circuit.state is state
    return circuit


@pytest.mark.parametrize(
    ("state", "event", "after"),
    [
        (CLOSED, "allow", CLOSED),
        (CLOSED, "succeeded", CLOSED),
        (CLOSED, "failed", OPEN),
        (OPEN, "allow early", OPEN),
        (OPEN, "allow", PROBING),
        (OPEN, "succeeded", CLOSED),
        (OPEN, "failed", OPEN),
        (PROBING, "allow", PROBING),
        (PROBING, "succeeded", CLOSED),
        (PROBING, "failed", OPEN),
    ],
)
def test_every_event_in_every_state(state: CircuitState, event: str, after: CircuitState) -> None:
    circuit = circuit_in(state)
    if event == "succeeded":
        circuit.succeeded()
    elif event == "failed":
        circuit.failed(1.0)
    else:
        now = 0.9 if event == "allow early" else 1.0
        refused = circuit.refuses(now)
        assert circuit.allow(now) is not refused
        assert refused == (state is PROBING or event == "allow early")
    assert circuit.state is after
    circuit.check()


def test_failures_count_in_a_row_only() -> None:
    circuit = circuit_in(CLOSED)
    circuit.succeeded()
    circuit.failed(0.0)
    circuit.failed(0.0)
    assert circuit.allow(0.0)
    circuit.failed(0.0)
    assert not circuit.allow(0.0)
    assert circuit.opened_total == 1


def test_each_failed_probe_doubles_the_pause_up_to_a_bound() -> None:
    circuit, now, pauses = circuit_in(OPEN), 0.0, []
    for _ in range(4):
        begin = now
        while not circuit.allow(now):
            now += 0.5
        pauses.append(now - begin)
        circuit.failed(now)
    assert pauses == [1.0, 2.0, 4.0, 4.0]
    while not circuit.allow(now):
        now += 0.5
    circuit.succeeded()
    for _ in range(3):
        circuit.failed(now)
    assert not circuit.allow(now + 0.9)
    assert circuit.allow(now + 1.0), "a success resets the back-off"


def test_a_burst_of_failures_counts_once() -> None:
    circuit = circuit_in(OPEN)
    for _ in range(50):
        circuit.failed(0.5)
    assert circuit.allow(1.0), "requests that set out before it opened prolong nothing"


def test_a_store_that_is_dead_for_an_hour_is_asked_a_handful_of_times() -> None:
    circuit, asked = Circuit(), 0
    for tenth in range(36_000):
        if circuit.allow(tenth / 10):
            asked += 1
            circuit.failed(tenth / 10)
    assert asked == 3 + 6 + 58, "three to open it, six while the pause grows to a minute, then one a minute"


@given(st.lists(st.tuples(st.sampled_from(["ask", "good", "bad"]), st.floats(0, 3)), max_size=60))
def test_at_most_one_probe_is_out_and_a_success_always_closes(events: list[tuple[str, float]]) -> None:
    circuit, now = Circuit(2, 1.0, 4.0), 0.0
    for event, seconds in events:
        now += seconds
        before = circuit.state
        if event == "ask":
            if circuit.allow(now):
                assert before is not PROBING
        elif event == "good":
            circuit.succeeded()
            assert circuit.state is CLOSED
        else:
            circuit.failed(now)
            assert circuit.state is not PROBING
        circuit.check()
