"""Which path copies a case, and why: pure rules over figures, measured here (`calibration`) or once on an H200.

A load is waited for: the fastest path wins, and within `SAME_RATE` of it the one that slows decode least. A store is
background work: of the paths within `STORE_RATE` of the fastest, the one that slows decode least wins. Slow-downs
within `SAME_SLOWDOWN` of the least are the same, then the faster path wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import log2

from dynamo_kernels.errors import CopyError

SAME_RATE = 0.97
STORE_RATE = 0.9
#: So much the slow-down of one path differs from round to round (H200, 2026-11-28: split +1.6 % and +2.4 %).
SAME_SLOWDOWN = 0.005
#: From here on the copy engines alone reach the link's rate (H200, 2026-11-22).
ENGINES_ALONE_BYTES = 64 << 10


#: Less than this is across before kernels and buffers pay (H200, 2026-11-22: 1 MiB 6 GB/s by engines, else 2).
FEW_BYTES = 4 << 20


#: Figures say nothing about fragments of more than about twice the size, or less than half of it. One point that was
#: known, 16 KiB, chose for 64 KiB: 43 GB/s where the rule of thumb gives 53 (H200, 2026-11-22).
_NEAR = 1


class Direction(str, Enum):
    """H2D loads, D2H stores."""

    H2D = "h2d"
    D2H = "d2h"


class Path(str, Enum):
    """`SPLIT` gives the copy engines one share of the blocks and the kernel the rest, at the same time.

    `TMA` is the zero-copy kernel by way of the tensor memory accelerator: stores only, loads reach half of the rate.
    """

    DMA = "dma"
    ZERO_COPY = "zero_copy"
    SPLIT = "split"
    STAGED = "staged"
    TMA = "tma"


@dataclass(frozen=True)
class Choice:
    """A path with its settings, and the sentence that explains it to a person."""

    path: Path
    #: CTAs of the zero-copy kernel (ZERO_COPY, SPLIT, TMA).
    ctas: int = 2
    #: Share of the blocks that the copy engines take (SPLIT).
    dma_share: float = 1.0
    why: str = ""


@dataclass(frozen=True)
class Case:
    """One copy as the rules see it."""

    direction: Direction
    fragment_bytes: int
    fragments: int
    #: Every address suits 16-byte loads (`Band.for_kernels`).
    for_kernels: bool = True
    #: A block is one two-dimensional copy (`Band.pitches`).
    has_lines: bool = True
    #: The parts of a host row touch, so that staging in HBM makes longer host fragments.
    has_rows: bool = True
    #: The GPU has TMA, and it reaches everything (`Band.for_tma`).
    for_tma: bool = True

    def allows(self, path: Path) -> bool:
        if path is Path.TMA:
            return self.for_tma and self.for_kernels and self.direction is Direction.D2H
        if path is Path.STAGED:
            return self.for_kernels and self.has_rows
        return path is Path.DMA or self.for_kernels


@dataclass(frozen=True)
class Figure:
    """One path measured on one case: bytes a second, and how much longer decode steps took meanwhile."""

    choice: Choice
    bytes_per_second: float
    slowdown: float | None = None


@dataclass(frozen=True)
class Point:
    """Where figures were taken."""

    direction: Direction
    fragment_bytes: int
    fragments: int
    has_lines: bool


def rule_of_thumb(case: Case) -> Choice:
    """The choice without a calibration, from the H200 figures in docs/benchmarks.md."""
    if case.fragment_bytes >= ENGINES_ALONE_BYTES or not case.for_kernels:
        reason = "fragments long enough for the copy engines" if case.for_kernels else "addresses unfit for kernels"
        return Choice(Path.DMA, why=f"rule: {reason}")
    if case.has_lines and case.fragment_bytes * case.fragments < FEW_BYTES:
        return Choice(Path.DMA, why="rule: too little to be worth a launch")
    if case.direction is Direction.H2D and case.has_rows:
        return Choice(Path.STAGED, why="rule: short fragments of whole rows, a load is waited for")
    if case.direction is Direction.D2H and case.has_lines:
        return Choice(Path.SPLIT, ctas=1, dma_share=0.5, why="rule: short fragments, a store must not be noticed")
    return Choice(Path.ZERO_COPY, ctas=2, why="rule: short fragments at irregular distances")


def best(figures: Sequence[Figure], case: Case) -> Choice | None:
    """The rule at the head of this file over what was measured; None when nothing measured is possible."""
    possible = [figure for figure in figures if case.allows(figure.choice.path)]
    if not possible:
        return None
    fastest = max(figure.bytes_per_second for figure in possible)
    share = SAME_RATE if case.direction is Direction.H2D else STORE_RATE
    near = [figure for figure in possible if figure.bytes_per_second >= share * fastest]
    most = min(figure.slowdown or 0.0 for figure in near) + SAME_SLOWDOWN
    quiet = [figure for figure in near if (figure.slowdown or 0.0) <= most]
    winner = max(quiet, key=lambda figure: figure.bytes_per_second)
    slower = "" if winner.slowdown is None else f", decode {winner.slowdown:+.1%}"
    of = f"fastest of {len(possible)} {fastest / 1e9:.1f}"
    why = f"measured: {winner.bytes_per_second / 1e9:.1f} GB/s{slower} ({of})"
    return Choice(winner.choice.path, winner.choice.ctas, winner.choice.dma_share, why)


def choose(case: Case, figures: Mapping[Point, Sequence[Figure]] | None = None, forced: Path | None = None) -> Choice:
    """`forced` where it is possible, else the nearest calibrated point if it is near, else the rule of thumb."""
    if forced is not None and case.allows(forced):
        return Choice(forced, ctas=2, dma_share=0.5, why="set by DYNAMO_KERNELS_COPY_PATH")
    alike = [point for point in figures or {} if (point.direction, point.has_lines) == (case.direction, case.has_lines)]
    if figures and alike:
        nearest = min(alike, key=lambda point: _distance(point, case))
        measured = best(figures[nearest], case) if _distance(nearest, case)[0] <= _NEAR else None
        if measured is not None:
            return measured
    return rule_of_thumb(case)


def _distance(point: Point, case: Case) -> tuple[float, float]:
    """By fragment size first: it decides more than the count."""
    size = abs(log2(point.fragment_bytes) - log2(case.fragment_bytes))
    return round(size), abs(log2(point.fragments) - log2(max(1, case.fragments)))


def parse_path(text: str) -> Path | None:
    """The value of DYNAMO_KERNELS_COPY_PATH: a path's name, or `auto`."""
    if text in ("", "auto"):
        return None
    try:
        return Path(text)
    except ValueError:
        known = ", ".join(path.value for path in Path)
        raise CopyError(f"DYNAMO_KERNELS_COPY_PATH={text!r} is no copy path; use auto or one of {known}") from None
