"""The life of one replica that the planner started, as a table: (state, event) -> (next state, effect).

Rules. Nothing is signalled while the proxy may still send to it: a stop goes drain -> idle -> removed ->
SIGTERM ->
gone. A step that fails before SIGTERM is undone by RESUME. Every effect may be repeated, so a stop that was
interrupted goes on from the state it is in. Pure: the shell performs effects and reports events.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from .errors import IllegalTransitionError


class State(str, Enum):
    STARTING = "starting"
    ADOPTING = "adopting"  # an earlier planner has started it
    REGISTERING = "registering"
    ABANDONING = "abandoning"
    READY = "ready"
    UNROUTING = "unrouting"
    DRAINING = "draining"
    REMOVING = "removing"
    RESUMING = "resuming"
    TERMINATING = "terminating"
    KILLING = "killing"
    FORGETTING = "forgetting"
    GONE = "gone"
    LOST = "lost"


class Event(str, Enum):
    HEALTHY = "healthy"
    DRAIN_ORDERED = "drain_ordered"
    KEEP_ORDERED = "keep_ordered"  # it is needed after all
    ACCEPTED = "accepted"
    UNKNOWN = "unknown"  # the proxy does not know the replica, or there is no proxy
    BUSY = "busy"  # the proxy refuses to forget a replica with requests in flight
    FAILED = "failed"
    IDLE = "idle"
    DEADLINE = "deadline"
    LAST_DEADLINE = "last_deadline"  # as DEADLINE, but there is no way back: no proxy, or the planner leaves
    EXITED = "exited"


class Effect(str, Enum):
    AWAIT_HEALTH = "await_health"
    REGISTER = "register"
    ASK_DRAIN = "ask_drain"
    AWAIT_IDLE = "await_idle"
    REMOVE = "remove"
    RESUME = "resume"
    TERMINATE = "terminate"
    KILL = "kill"
    NOTHING = "nothing"


S, E, F = State, Event, Effect
TABLE: dict[tuple[State, Event], tuple[State, Effect]] = {
    (S.STARTING, E.HEALTHY): (S.REGISTERING, F.REGISTER),
    (S.STARTING, E.DRAIN_ORDERED): (S.TERMINATING, F.TERMINATE),
    (S.STARTING, E.DEADLINE): (S.TERMINATING, F.TERMINATE),
    (S.STARTING, E.LAST_DEADLINE): (S.TERMINATING, F.TERMINATE),
    (S.STARTING, E.EXITED): (S.FORGETTING, F.REMOVE),
    (S.ADOPTING, E.HEALTHY): (S.RESUMING, F.RESUME),  # that planner may have begun to drain it
    (S.ADOPTING, E.DRAIN_ORDERED): (S.UNROUTING, F.ASK_DRAIN),
    (S.ADOPTING, E.DEADLINE): (S.UNROUTING, F.ASK_DRAIN),
    (S.ADOPTING, E.LAST_DEADLINE): (S.TERMINATING, F.TERMINATE),
    (S.ADOPTING, E.EXITED): (S.FORGETTING, F.REMOVE),
    (S.REGISTERING, E.ACCEPTED): (S.READY, F.NOTHING),
    (S.REGISTERING, E.FAILED): (S.REGISTERING, F.REGISTER),
    (S.REGISTERING, E.DRAIN_ORDERED): (S.UNROUTING, F.ASK_DRAIN),
    (S.REGISTERING, E.DEADLINE): (S.ABANDONING, F.REMOVE),
    (S.REGISTERING, E.LAST_DEADLINE): (S.ABANDONING, F.REMOVE),
    (S.REGISTERING, E.EXITED): (S.FORGETTING, F.REMOVE),
    (S.ABANDONING, E.ACCEPTED): (S.TERMINATING, F.TERMINATE),
    (S.ABANDONING, E.UNKNOWN): (S.TERMINATING, F.TERMINATE),
    (S.ABANDONING, E.FAILED): (S.TERMINATING, F.TERMINATE),
    (S.ABANDONING, E.BUSY): (S.UNROUTING, F.ASK_DRAIN),
    (S.ABANDONING, E.DEADLINE): (S.TERMINATING, F.TERMINATE),
    (S.ABANDONING, E.LAST_DEADLINE): (S.TERMINATING, F.TERMINATE),
    (S.ABANDONING, E.EXITED): (S.FORGETTING, F.REMOVE),
    (S.READY, E.DRAIN_ORDERED): (S.UNROUTING, F.ASK_DRAIN),
    (S.READY, E.EXITED): (S.FORGETTING, F.REMOVE),
    (S.UNROUTING, E.ACCEPTED): (S.DRAINING, F.AWAIT_IDLE),
    (S.UNROUTING, E.UNKNOWN): (S.DRAINING, F.AWAIT_IDLE),
    (S.UNROUTING, E.FAILED): (S.RESUMING, F.RESUME),
    (S.UNROUTING, E.DEADLINE): (S.RESUMING, F.RESUME),
    (S.UNROUTING, E.LAST_DEADLINE): (S.TERMINATING, F.TERMINATE),
    (S.UNROUTING, E.KEEP_ORDERED): (S.RESUMING, F.RESUME),
    (S.UNROUTING, E.EXITED): (S.FORGETTING, F.REMOVE),
    (S.DRAINING, E.IDLE): (S.REMOVING, F.REMOVE),
    (S.DRAINING, E.DEADLINE): (S.RESUMING, F.RESUME),
    (S.DRAINING, E.LAST_DEADLINE): (S.TERMINATING, F.TERMINATE),
    (S.DRAINING, E.KEEP_ORDERED): (S.RESUMING, F.RESUME),
    (S.DRAINING, E.EXITED): (S.FORGETTING, F.REMOVE),
    (S.REMOVING, E.ACCEPTED): (S.TERMINATING, F.TERMINATE),
    (S.REMOVING, E.UNKNOWN): (S.TERMINATING, F.TERMINATE),
    (S.REMOVING, E.BUSY): (S.DRAINING, F.AWAIT_IDLE),
    (S.REMOVING, E.FAILED): (S.RESUMING, F.RESUME),
    (S.REMOVING, E.DEADLINE): (S.RESUMING, F.RESUME),
    (S.REMOVING, E.LAST_DEADLINE): (S.TERMINATING, F.TERMINATE),
    (S.REMOVING, E.KEEP_ORDERED): (S.RESUMING, F.RESUME),
    (S.REMOVING, E.EXITED): (S.FORGETTING, F.REMOVE),
    (S.RESUMING, E.ACCEPTED): (S.READY, F.NOTHING),
    (S.RESUMING, E.UNKNOWN): (S.REGISTERING, F.REGISTER),
    (S.RESUMING, E.FAILED): (S.RESUMING, F.RESUME),
    (S.RESUMING, E.DRAIN_ORDERED): (S.UNROUTING, F.ASK_DRAIN),
    # The proxy stays unreachable: the replica runs on, and the next order drains it again.
    (S.RESUMING, E.DEADLINE): (S.READY, F.NOTHING),
    (S.RESUMING, E.LAST_DEADLINE): (S.TERMINATING, F.TERMINATE),
    (S.RESUMING, E.EXITED): (S.FORGETTING, F.REMOVE),
    (S.TERMINATING, E.EXITED): (S.FORGETTING, F.REMOVE),
    (S.TERMINATING, E.DEADLINE): (S.KILLING, F.KILL),
    (S.TERMINATING, E.LAST_DEADLINE): (S.KILLING, F.KILL),
    (S.KILLING, E.EXITED): (S.FORGETTING, F.REMOVE),
    (S.KILLING, E.DEADLINE): (S.LOST, F.NOTHING),
    (S.KILLING, E.LAST_DEADLINE): (S.LOST, F.NOTHING),
    (S.FORGETTING, E.ACCEPTED): (S.GONE, F.NOTHING),
    (S.FORGETTING, E.UNKNOWN): (S.GONE, F.NOTHING),
    (S.FORGETTING, E.BUSY): (S.FORGETTING, F.REMOVE),
    (S.FORGETTING, E.FAILED): (S.FORGETTING, F.REMOVE),
    (S.FORGETTING, E.DEADLINE): (S.GONE, F.NOTHING),
    (S.FORGETTING, E.LAST_DEADLINE): (S.GONE, F.NOTHING),
}

BEGINNINGS = {S.STARTING: F.AWAIT_HEALTH, S.ADOPTING: F.AWAIT_HEALTH, S.TERMINATING: F.TERMINATE}
"""Where a life may begin: started now, or found running, or found on its way out."""
SETTLED = frozenset({S.READY, S.GONE, S.LOST})
ENDED = frozenset({S.GONE, S.LOST})
AFTER_EXIT = frozenset({S.FORGETTING, S.GONE, S.LOST})
SUPPLY = frozenset({S.STARTING, S.ADOPTING, S.REGISTERING, S.READY, S.RESUMING})

REASONS: dict[tuple[State, Event], str] = {
    (S.STARTING, E.DEADLINE): "start_timeout",
    (S.STARTING, E.LAST_DEADLINE): "start_timeout",
    (S.STARTING, E.EXITED): "start_exited",
    (S.ADOPTING, E.DEADLINE): "start_timeout",
    (S.ADOPTING, E.LAST_DEADLINE): "start_timeout",
    (S.ADOPTING, E.EXITED): "crashed",
    (S.REGISTERING, E.DEADLINE): "register_failed",
    (S.READY, E.EXITED): "crashed",
    (S.UNROUTING, E.FAILED): "drain_refused",
    (S.UNROUTING, E.DEADLINE): "drain_timeout",
    (S.UNROUTING, E.LAST_DEADLINE): "drain_cut_short",
    (S.DRAINING, E.DEADLINE): "drain_timeout",
    (S.DRAINING, E.LAST_DEADLINE): "drain_cut_short",
    (S.DRAINING, E.EXITED): "crashed",
    (S.REMOVING, E.FAILED): "remove_failed",
    (S.REMOVING, E.DEADLINE): "drain_timeout",
    (S.REMOVING, E.LAST_DEADLINE): "drain_cut_short",
    (S.RESUMING, E.DEADLINE): "resume_failed",
    (S.TERMINATING, E.DEADLINE): "sigterm_ignored",
    (S.TERMINATING, E.LAST_DEADLINE): "sigterm_ignored",
    (S.KILLING, E.DEADLINE): "kill_failed",
    (S.KILLING, E.LAST_DEADLINE): "kill_failed",
    (S.FORGETTING, E.DEADLINE): "proxy_still_lists_it",
    (S.FORGETTING, E.LAST_DEADLINE): "proxy_still_lists_it",
}
"""Words for the steps that an operator wants to hear about."""


def step(state: State, event: Event) -> tuple[State, Effect]:
    """The next state and what to do. Raises `IllegalTransitionError` naming both when there is no such
    step.
    """
    try:
        return TABLE[state, event]
    except KeyError:
        raise IllegalTransitionError(f"a replica that is {state.value} cannot take {event.value}") from None


def phase(state: State) -> str:
    """The name of the deadline that a state runs under; states of one phase share one deadline."""
    if state in (S.UNROUTING, S.DRAINING, S.REMOVING):
        return "drain"
    return str(state.value)


class Lifecycle:
    """One replica's state, its pending effect and the words collected on the way."""

    def __init__(self, state: State = State.STARTING) -> None:
        self.state = state
        self.effect = BEGINNINGS[state]
        self.reasons: list[str] = []

    def feed(self, event: Event) -> None:
        """Take one step."""
        reason = REASONS.get((self.state, event))
        self.state, self.effect = step(self.state, event)
        if reason is not None:
            self.reasons.append(reason)

    def can(self, event: Event) -> bool:
        return (self.state, event) in TABLE

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        reached = set(TABLE.values()) | set(BEGINNINGS.items())
        assert (self.state, self.effect) in reached, f"{self.state} never has {self.effect} to do"
        assert (self.state in SETTLED) == (self.effect is Effect.NOTHING), "a settled replica has nothing to do"


def choose_victim(candidates: Iterable[tuple[str, int, float]]) -> str | None:
    """The URL to stop: least in flight, then the youngest. Candidates are (url, in flight, age in
    seconds).
    """
    ordered = sorted(candidates, key=lambda entry: (entry[1], entry[2], entry[0]))
    return ordered[0][0] if ordered else None
