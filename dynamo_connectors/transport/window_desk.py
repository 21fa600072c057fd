"""Which rows of an owner's window serve which READ. Pure.

Blocks lie in host memory; a READ of the window gets rows for itself, which are filled from there when it asks.
Life of a READ's rows: waiting (until enough are free, first come first served) -> filling -> ready -> given back, when
its reader has said that it is over, or when it has given the READ up. Every row counts how often it was given out, and
its READ is told that generation: rows that were given to another READ since are refused by the fence.

A reader that has died keeps its rows until its deadline. Nobody waits for that: when for a moment no READ got rows,
those that wait are granted none, and look for their blocks in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

#: The longest time without a READ that gets rows; filling and reading them takes milliseconds.
_STUCK_SECONDS = 0.5

#: Counts that are words of 8 bytes where somebody looks at them.
Counters: TypeAlias = list[int] | npt.NDArray[np.uint64]
#: A reader's name and its number.
ReadName: TypeAlias = tuple[bytes, int]


class Source(NamedTuple):
    """A slot of host memory, and how often it had been filled when it held what is wanted."""

    slot: int
    generation: int


class Fill(NamedTuple):
    """Copy host slots `slots` to window rows `rows`; answer with `filled`."""

    number: int
    slots: tuple[int, ...]
    rows: tuple[int, ...]


@dataclass
class _Serving:
    #: For each block that was asked for; None where the owner does not have it.
    sources: tuple[Source | None, ...]
    until: float
    #: waiting, filling or ready.
    state: str = "waiting"
    #: As `sources`, -1 where there is none.
    rows: tuple[int, ...] = ()
    generations: tuple[int, ...] = ()
    #: Its rows are given back as soon as they are filled.
    is_left: bool = False

    @property
    def in_use(self) -> list[int]:
        return [row for row in self.rows if row >= 0]


class WindowDesk:
    """One per owner. `generations`: of each row, where readers look at them (`messages.WordsPlace`)."""

    def __init__(self, generations: Counters) -> None:
        self._free = list(range(len(generations)))
        self._generations = generations
        self._reads: dict[ReadName, _Serving] = {}
        self._filling: dict[int, tuple[ReadName, _Serving]] = {}
        self._fills: list[Fill] = []
        self._numbers = count(1)
        #: READs that got rows so far, as of when that was seen to have changed, or nobody waited.
        self._served, self._served_then, self._moved_at = 0, 0, 0.0

    def ask(self, read: ReadName, sources: Sequence[Source | None], until: float) -> None:
        """Its reader wants these, and gives up on them then. It may ask again."""
        known = self._reads.get(read)
        if known is not None:
            known.until = max(known.until, until)
            return
        room = len(self._generations)
        kept = []
        for source in sources:
            room -= source is not None
            kept.append(source if room >= 0 else None)
        self._reads[read] = _Serving(tuple(kept), until)
        self._serve()

    def granted(self, read: ReadName) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Rows and generations for each block it asked for, -1 for what it does not get. None: not yet."""
        known = self._reads.get(read)
        return (known.rows, known.generations) if known is not None and known.state == "ready" else None

    def take_fills(self) -> list[Fill]:
        fills, self._fills = self._fills, []
        return fills

    def filled(self, number: int, holds: Callable[[Source], bool]) -> ReadName | None:
        """The copies are complete. Returns the READ that waits for them. `holds`: the slot is still what it was."""
        read, serving = self._filling.pop(number)
        if serving.is_left:
            self._give_back(serving)
            return None
        serving.state = "ready"
        pairs = zip(serving.sources, serving.rows, strict=True)
        lost = {row for source, row in pairs if source is not None and not holds(source)}
        if lost:
            self._free = sorted([*self._free, *lost])
            serving.rows = tuple(-1 if row in lost else row for row in serving.rows)
            self._serve()
        return read

    def leave(self, read: ReadName) -> None:
        """The READ is over: its rows may serve another one."""
        serving = self._reads.pop(read, None)
        if serving is None:
            return
        if serving.state == "filling":
            serving.is_left = True
        else:
            self._give_back(serving)

    def expire(self, now: float) -> None:
        over = [read for read, serving in self._reads.items() if serving.until <= now]
        for read in reversed(over):  # the last first: those that wait shall not get rows of the others
            self.leave(read)
        waiting = [serving for serving in self._reads.values() if serving.state == "waiting"]
        if not waiting or self._served != self._served_then:
            self._served_then, self._moved_at = self._served, now
        elif now - self._moved_at >= _STUCK_SECONDS:
            for serving in waiting:
                serving.state = "ready"
                serving.rows, serving.generations = (-1,) * len(serving.sources), (0,) * len(serving.sources)

    def check(self) -> None:
        """Asserts every invariant."""
        left = [serving for _, serving in self._filling.values() if serving.is_left]
        taken = [row for serving in (*self._reads.values(), *left) for row in serving.in_use]
        assert sorted(self._free + taken) == list(range(len(self._generations))), "a row is lost, or somebody's twice"
        filling = {id(serving) for serving in self._reads.values() if serving.state == "filling"}
        assert filling <= {id(serving) for _, serving in self._filling.values()}, "rows are filled by nobody"

    def _serve(self) -> None:
        """In turn: a READ that wants many rows is not overtaken for ever by those that want few."""
        for read, serving in self._reads.items():
            if serving.state != "waiting":
                continue
            wanted = sum(source is not None for source in serving.sources)
            if wanted > len(self._free):
                return
            taken, self._free = self._free[:wanted], self._free[wanted:]
            for row in taken:
                self._generations[row] += 1
            rows = iter(taken)
            serving.rows = tuple(-1 if source is None else next(rows) for source in serving.sources)
            serving.generations = tuple(0 if row < 0 else int(self._generations[row]) for row in serving.rows)
            serving.state = "filling" if wanted else "ready"
            self._served += 1
            if wanted:
                number = next(self._numbers)
                slots = tuple(source.slot for source in serving.sources if source is not None)
                self._fills.append(Fill(number, slots, tuple(taken)))
                self._filling[number] = read, serving

    def _give_back(self, serving: _Serving) -> None:
        self._free = sorted(self._free + serving.in_use)
        serving.rows = ()
        self._serve()
