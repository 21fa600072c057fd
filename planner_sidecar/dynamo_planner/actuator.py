"""The one protocol behind which replicas are started and stopped, and the actuator that only says what it
would do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Outcome:
    """What became of one decision: each action taken as a sentence, or why nothing was done."""

    accepted: bool
    reason: str
    actions: tuple[str, ...]


@dataclass(frozen=True)
class Happening:
    """Something that became of a replica later. `reason` is empty when it went as ordered."""

    url: str
    what: str
    reason: str
    text: str


@dataclass(frozen=True)
class Supplement:
    """What an actuator knows beside the engines' states: how long replicas took that became ready since the last look,
    whether somebody else has changed the count, and how many are ordered (None: no more than there are).
    """

    startups: tuple[float, ...] = ()
    is_edited: bool = False
    ordered: int | None = None


NOTHING_MORE = Supplement()


class Actuator(Protocol):
    """Starts and stops replicas. Methods return soon; long work goes on in the background."""

    mode: str

    def states(self) -> Mapping[str, str]:
        """URL -> starting, ready or draining of every replica that this actuator started."""

    async def refresh(self) -> Supplement:
        """Look at what is there, once per tick. Raises ObservationError: nothing is known then, and nothing is done."""

    async def apply(self, current: int, desired: int, by_hand: bool) -> Outcome:
        """Begin to move from `current` to `desired` replicas."""

    async def restart(self) -> Outcome:
        """Begin to replace every replica, one at a time, drained."""

    def happenings(self) -> list[Happening]:
        """What happened since the last call."""

    async def close(self) -> None:
        """Stop everything that was started, drained first, within a bounded time."""

    def kill_now(self) -> None:
        """The last resort, without waiting."""

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""


class AdvisoryActuator:
    """Does nothing and says what it would do."""

    mode = "advisory"

    def states(self) -> Mapping[str, str]:
        return {}

    async def refresh(self) -> Supplement:
        return NOTHING_MORE

    async def apply(self, current: int, desired: int, by_hand: bool) -> Outcome:
        verb = "start" if desired > current else "drain and stop"
        return Outcome(False, "advisory", (f"advisory: would {verb} {abs(desired - current)} replica(s)",))

    async def restart(self) -> Outcome:
        return Outcome(False, "advisory", ("advisory: would replace every replica, one at a time",))

    def happenings(self) -> list[Happening]:
        return []

    async def close(self) -> None:
        return None

    def kill_now(self) -> None:
        return None

    def check(self) -> None:
        return None
