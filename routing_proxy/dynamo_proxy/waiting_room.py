"""Requests that wait because every engine has as many as it may have: bounded, in order, not for ever.

Off unless engines have a limit. The order is that of priority, then of the time at which a first token is due: what an
SLO class wants, at the latest the end of the wait. So those of one class go as they came. When the queue is full, a
request of a class drives out whoever is behind it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import NamedTuple, Protocol

from .last_resort import Endable, guarded
from .text_chain import Prompt


class Held(Endable, Protocol):
    """A request that can wait."""

    over: bool

    def start(self) -> None: ...
    def turn_away(self, status: int, code: str, message: str) -> None: ...


class Waiting(NamedTuple):
    """One place in the queue: the smallest is next."""

    priority: int
    due: float
    number: int
    since: float
    model: str
    request: Held


class WaitingRoom:
    """The queue, and when its first may go."""

    def __init__(self, has_room: Callable[[str], bool], size: int, seconds: float) -> None:
        self._has_room = has_room
        self._size = size
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._queue: list[Waiting] = []
        self._number = 0
        self._timer: asyncio.TimerHandle | None = None
        self._call: asyncio.Handle | None = None

    def __len__(self) -> int:
        return sum(1 for waiting in self._queue if not waiting.request.over)

    def enter(self, request: Held, prompt: Prompt) -> None:
        """Start a request now, let it wait, or turn it or another one away."""
        if not self._queue and self._has_room(prompt.model):
            request.start()
            return
        if len(self._queue) >= self._size:
            self._sweep()
        self._number += 1
        now = self._loop.time()
        due = now + (self._seconds if prompt.slo is None else min(prompt.slo.ttft_seconds, self._seconds))
        place = Waiting(prompt.priority, due, self._number, now, prompt.model, request)
        if len(self._queue) >= self._size:
            last = max(self._queue, default=place)
            if prompt.slo is None or last <= place:
                self._refuse(request)
                return
            self._queue.remove(last)
            heapify(self._queue)
            self._refuse(last.request)
        heappush(self._queue, place)
        if self._timer is None:
            self._timer = self._loop.call_later(min(1.0, self._seconds), self._tick)
        self.wake()

    def _refuse(self, request: Held) -> None:
        message = "all engines are busy and too many requests wait already"
        guarded(request, request.turn_away, 429, "queue_full", message)

    def wake(self) -> None:
        """An engine may have room: look soon, not from inside whoever says so."""
        if self._queue and self._call is None:
            self._call = self._loop.call_soon(self._advance)

    def close(self) -> None:
        for handle in (self._timer, self._call):
            if handle is not None:
                handle.cancel()
        self._timer = self._call = None
        self._queue.clear()

    def _advance(self) -> None:
        """Start everybody who may go, first things first; one model's queue does not hold up another's."""
        self._call = None
        kept = []
        full: set[str] = set()
        while self._queue:
            waiting = heappop(self._queue)
            if waiting.request.over:
                continue
            if waiting.model in full or not self._has_room(waiting.model):
                full.add(waiting.model)
                kept.append(waiting)
            else:
                waiting.request.start()
        self._queue = kept  # sorted, hence a heap

    def _tick(self) -> None:
        self._timer = None
        self._sweep()
        latest = self._loop.time() - self._seconds
        for waiting in [waiting for waiting in self._queue if waiting.since <= latest]:
            message = f"no engine had room within {self._seconds:g} s"
            guarded(waiting.request, waiting.request.turn_away, 503, "queue_timeout", message)
        self._sweep()
        self.wake()
        if self._queue:
            self._timer = self._loop.call_later(min(1.0, self._seconds), self._tick)

    def _sweep(self) -> None:
        """Drop those whose clients left."""
        self._queue = [waiting for waiting in self._queue if not waiting.request.over]
        heapify(self._queue)

    def check(self) -> None:
        assert len(self._queue) <= self._size, f"{len(self._queue)} requests wait in a room for {self._size}"
        assert not self._queue or self._timer is not None, "requests wait and nobody looks at the clock"
