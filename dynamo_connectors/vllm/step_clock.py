"""The steps under way: how fast this engine prefills, and whether one of them may fail. Pure: time is an argument."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

#: Smaller steps say more about decoding and launch overhead than about prefill.
FEWEST_PREFILL_TOKENS = 64
_RECENT = 8


class _Step(NamedTuple):
    planned_at: float
    prefill_tokens: int
    num_tokens: int
    #: It may take as long as a load, which says nothing of computing.
    may_wait: bool = False
    #: Another connector loads within it; whether that went well is told when it ends.
    may_fail: bool = False


class Prefill(NamedTuple):
    tokens: int
    seconds: float


class StepClock:
    """Steps end in the order in which they were planned; with async scheduling two are under way at a time."""

    def __init__(self) -> None:
        self._steps: deque[_Step] = deque()
        self._last_end = float("-inf")
        #: What the last few steps took that computed anything.
        self._recent: deque[float] = deque(maxlen=_RECENT)

    @property
    def least_seconds(self) -> float:
        """What a step takes at least, going by the last few; 0 before there are so many."""
        return min(self._recent) if len(self._recent) == _RECENT else 0.0

    @property
    def is_in_doubt(self) -> bool:
        """Whether what counts as computed may turn out not to be, once the steps under way have ended."""
        return any(step.may_fail for step in self._steps)

    def planned(self, now: float, prefill_tokens: int, num_tokens: int, may_fail: bool = False) -> None:
        self._steps.append(_Step(now, prefill_tokens, num_tokens, may_fail=may_fail))

    def may_wait(self) -> None:
        """The step that was planned last may wait for a load."""
        if self._steps:
            self._steps[-1] = self._steps[-1]._replace(may_wait=True)

    def ended(self, now: float) -> Prefill | None:
        """What the oldest open step says about prefill, if it was mostly prefill."""
        if not self._steps:
            return None
        step = self._steps.popleft()
        # A step that was planned while the one before it ran started when that one ended.
        seconds = now - max(step.planned_at, self._last_end)
        self._last_end = now
        if step.may_wait:
            return None
        if step.num_tokens:
            self._recent.append(seconds)
        if step.prefill_tokens < FEWEST_PREFILL_TOKENS or 2 * step.prefill_tokens < step.num_tokens or seconds <= 0:
            return None
        return Prefill(step.num_tokens, seconds)
