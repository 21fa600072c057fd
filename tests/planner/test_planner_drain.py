"""The life of a replica: every (state, event) pair, and the promises that the table makes."""

from __future__ import annotations

import itertools

import pytest
from dynamo_planner.drain import (
    AFTER_EXIT,
    ENDED,
    REASONS,
    SETTLED,
    TABLE,
    Effect,
    Event,
    Lifecycle,
    State,
    choose_victim,
    step,
)
from dynamo_planner.errors import IllegalTransitionError
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_every_pair_steps_or_names_itself(state: State, event: Event) -> None:
    if (state, event) in TABLE:
        following, effect = step(state, event)
        assert (following in SETTLED) == (effect is Effect.NOTHING)
    else:
        with pytest.raises(IllegalTransitionError, match=f"{state.value} cannot take {event.value}"):
            step(state, event)


@pytest.mark.parametrize("state", [state for state in State if state not in SETTLED])
def test_whatever_is_under_way_has_a_deadline_and_survives_an_exit(state: State) -> None:
    assert (state, Event.DEADLINE) in TABLE
    assert (state, Event.LAST_DEADLINE) in TABLE
    assert state in AFTER_EXIT or TABLE[state, Event.EXITED][0] is State.FORGETTING


def test_reasons_belong_to_steps() -> None:
    assert set(REASONS) <= set(TABLE)


def test_a_signal_follows_only_a_removal_a_last_resort_or_a_life_without_traffic() -> None:
    causes = {pair for pair, (_, effect) in TABLE.items() if effect is Effect.TERMINATE}
    for state, event in causes:
        unrouted = state in (State.STARTING, State.ABANDONING) or (
            state is State.REMOVING and event in (Event.ACCEPTED, Event.UNKNOWN)
        )
        assert unrouted or event is Event.LAST_DEADLINE, f"{state} {event} signals a replica with traffic"


def test_a_failure_before_the_signal_is_undone() -> None:
    for state in (State.UNROUTING, State.DRAINING, State.REMOVING):
        assert TABLE[state, Event.DEADLINE] == (State.RESUMING, Effect.RESUME)


def test_every_state_can_end() -> None:
    ends = set(ENDED)
    for _ in State:
        ends |= {state for (state, _), (following, _) in TABLE.items() if following in ends}
    assert ends == set(State)


@given(st.lists(st.sampled_from(list(Event)), max_size=40))
def test_no_walk_breaks_the_invariants(events: list[Event]) -> None:
    life = Lifecycle()
    for event in events:
        if life.can(event):
            life.feed(event)
        life.check()


def test_the_victim_has_least_in_flight_and_is_the_youngest() -> None:
    assert choose_victim([("a", 3, 1.0), ("b", 1, 50.0), ("c", 1, 5.0)]) == "c"
    assert choose_victim([]) is None
