"""The last hours of one pool as plain points, for the decision page."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from .decision import is_blind
from .demand import demand, forecast_rule
from .forecast import outlook
from .records import Decision
from .sizing import cleaned
from .slo import attained


@dataclass(frozen=True)
class Sight:
    """What one tick saw and foresaw; rates in requests/s, None where nothing is known."""

    at_seconds: float
    rate: float | None
    lower: float | None
    point: float | None
    upper: float | None
    horizon_seconds: float
    current: int
    desired: int
    attained: float | None
    is_blind: bool = False


def sight(decision: Decision, wall_seconds: float) -> Sight:
    """What a decision rested on."""
    fleet, policy, memory = cleaned(decision.inputs.observation), decision.inputs.policy, decision.memory
    wanted = demand(memory, fleet, policy)
    ahead = outlook(memory.forecast, forecast_rule(memory, policy))
    known = memory.arrival_rate is not None
    return Sight(
        at_seconds=wall_seconds,
        rate=wanted.now if known else None,
        lower=None if ahead is None else ahead.lower,
        point=None if ahead is None else ahead.point,
        upper=None if ahead is None else ahead.upper,
        horizon_seconds=wanted.horizon_seconds,
        current=decision.current,
        desired=decision.desired,
        attained=attained(fleet),
        is_blind=is_blind(decision),
    )


class History:
    """The last `keep` sights, oldest first."""

    def __init__(self, keep: int = 1440) -> None:
        self.sights: deque[Sight] = deque(maxlen=keep)

    def add(self, seen: Sight) -> None:
        self.sights.append(seen)

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        assert self.sights.maxlen is not None, "the history is unbounded"
