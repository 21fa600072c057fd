"""Times every path on this GPU, and how much decode slows down meanwhile: small copies, two seconds of them a start.

The most telling points first; what there was no time for is measured by the next start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import log2
from statistics import median
from typing import Any, Protocol

import torch

from dynamo_kernels.block_view import BlockView
from dynamo_kernels.choices import ENGINES_ALONE_BYTES, Case, Choice, Direction, Figure, Path, Point
from dynamo_kernels.machine import CudaMachine, Machine
from dynamo_kernels.plan import CopyPlan

Clock = Callable[[], float]

#: What one start measures. Kernels that are compiled first, once a machine, are not on it, but bounded all the same.
_BUDGET_SECONDS = 1.8
_LONGEST_SECONDS = 12.0
#: 64 MiB were too few: `staged` begins and ends with a buffer that nothing runs beside, and lost to `zero_copy`, than
#: which it is faster from about 100 MiB on (H200, 2026-11-28).
_MOST_BYTES, _MOST_FRAGMENTS, _FEW_FRAGMENTS = 128 << 20, 8192, 64
_TIMES = 2
#: A transfer is longer than these copies: several in a row hide what happens once a call.
_IN_A_ROW = 2
#: (fragment, parts a block).
_SHAPES = ((16 << 10, 32), (64 << 10, 32), (2 << 20, 1), (4 << 10, 32))
#: As long as the decode steps that are timed beside them.
_ENOUGH_COPIES = 5
_CANDIDATES = (
    Choice(Path.DMA),
    Choice(Path.ZERO_COPY, ctas=2),
    Choice(Path.SPLIT, ctas=1, dma_share=0.5),
    Choice(Path.STAGED),
    Choice(Path.TMA, ctas=2),
)
_OF_ONE_PART = (Path.DMA, Path.ZERO_COPY)
#: Decode of a dense model is a stream of weights through HBM: 128 MiB of them, read four times a step.
_WIDTH, _BATCH, _MATRICES, _STEPS = 8192, 16, 4, 30


@dataclass
class _Memory:
    hbm: torch.Tensor
    host: torch.Tensor
    machine: Machine


class Bench(Protocol):
    """One point's copies."""

    def allows(self, choice: Choice) -> bool:
        """Whether this machine can copy the point so."""

    def start(self, choice: Choice) -> None:
        """Enqueues the copy once."""

    def finish(self) -> None:
        """Waits until all that was enqueued is done."""

    def rate(self, choice: Choice) -> float:
        """Bytes a second as a caller sees them."""

    def slowdown(self, choice: Choice) -> float:
        """How much longer decode takes meanwhile, as a fraction."""


class Budget:
    """Seconds that measuring took, and since when."""

    def __init__(
        self, measuring: float = _BUDGET_SECONDS, longest: float = _LONGEST_SECONDS, clock: Clock = time.perf_counter
    ) -> None:
        self._left, self._end, self._clock = measuring, clock() + longest, clock

    @property
    def is_spent(self) -> bool:
        return self._left <= 0 or self._clock() >= self._end

    @contextmanager
    def spending(self) -> Iterator[None]:
        started = self._clock()
        yield
        self._left -= self._clock() - started


def measure(device: torch.device, points: Sequence[Point]) -> Iterator[tuple[Point, tuple[Figure, ...]]]:
    """Figures of `points` in their order, as far as time goes."""
    if not points:
        return
    memory = _Memory(
        torch.zeros(_MOST_BYTES, dtype=torch.uint8, device=device),
        torch.zeros(_MOST_BYTES, dtype=torch.uint8, pin_memory=True),
        CudaMachine(device),
    )
    lane = torch.cuda.Stream(device, priority=-1)
    decode = _Decode(device)
    with torch.cuda.stream(lane):
        yield from measure_points(points, lambda point: CopyBench(point, memory, decode.slowdown), Budget())
    torch.cuda.synchronize(device)


def measure_points(
    points: Sequence[Point], make: Callable[[Point], Bench], budget: Budget
) -> Iterator[tuple[Point, tuple[Figure, ...]]]:
    """A point is measured whole or not at all: half of its paths would look like all there are."""
    for point in points:
        if budget.is_spent:
            return
        bench = make(point)
        usual = [choice for choice in _CANDIDATES if parts_of(point) > 1 or choice.path in _OF_ONE_PART]
        candidates = [choice for choice in usual if bench.allows(choice)]
        # The engines first: they have nothing to compile. Then what compiles, so that nothing does on the budget.
        for choice in candidates:
            bench.start(choice)
        bench.finish()
        with budget.spending():
            figures = _measure_point(point, candidates, bench)
        yield point, figures


def telling_points(fragment_bytes: int | None = None) -> list[Point]:
    """All points, the most telling first: nearest to the engine's own fragments, and loads, which are waited for."""
    wanted = log2(fragment_bytes or _SHAPES[0][0])

    def worth(point: Point) -> tuple[float, bool, bool, bool]:
        return (
            abs(log2(point.fragment_bytes) - wanted),
            point.fragments <= _FEW_FRAGMENTS and parts_of(point) > 1,
            not point.has_lines and parts_of(point) > 1,
            point.direction is Direction.D2H,
        )

    return sorted(_points(), key=worth)


def parts_of(point: Point) -> int:
    return next(parts for fragment, parts in _SHAPES if fragment == point.fragment_bytes)


def _points() -> Iterator[Point]:
    for fragment, parts in _SHAPES:
        for direction in Direction:
            many = min(_MOST_FRAGMENTS, _MOST_BYTES // fragment)
            # Only short parts are copied as lines, so only for them the distances matter.
            for has_lines in (True, False) if parts > 1 and fragment < ENGINES_ALONE_BYTES else (parts > 1,):
                yield Point(direction, fragment, many, has_lines)
            if fragment == _SHAPES[0][0]:
                yield Point(direction, fragment, _FEW_FRAGMENTS, True)


def _measure_point(point: Point, candidates: Sequence[Choice], bench: Bench) -> tuple[Figure, ...]:
    rates = [(choice, bench.rate(choice)) for choice in candidates]
    promising = 0.8 * max(rate for _, rate in rates)
    many = point.fragments > _FEW_FRAGMENTS or parts_of(point) == 1
    return tuple(
        Figure(choice, rate, bench.slowdown(choice) if many and rate >= promising else None) for choice, rate in rates
    )


class CopyBench:
    """One point's views and ids: pages of the parts at equal distances, or with two parts exchanged."""

    def __init__(self, point: Point, memory: _Memory, slowdown: Callable[[Bench, Choice], float]) -> None:
        parts = parts_of(point)
        blocks = point.fragments // parts
        size = blocks * parts * point.fragment_bytes
        pages = list(memory.hbm[:size].view(parts, blocks, point.fragment_bytes).unbind(0))
        if not point.has_lines and parts > 1:
            pages[0], pages[1] = pages[1], pages[0]
        sizes = [point.fragment_bytes] * parts
        hbm = BlockView.of_pages(pages, sizes)
        rows = BlockView.of_rows(memory.host[:size].view(blocks, -1), sizes)
        views = (hbm, rows) if point.direction is Direction.D2H else (rows, hbm)
        self._choice, self._current, self._slowdown = Choice(Path.DMA), memory.machine.current, slowdown
        self._plan = CopyPlan(*views, point.direction, memory.machine, self._chosen)
        self._bytes = size
        # Neighbours must not be copied as one: every other block first, then the rest.
        self._ids = list(range(0, blocks, 2)) + list(range(1, blocks, 2))

    def allows(self, choice: Choice) -> bool:
        return all(case.allows(choice.path) for case in self._plan.cases(len(self._ids)))

    def _chosen(self, case: Case) -> Choice:
        return self._choice

    def start(self, choice: Choice) -> None:
        self._choice = choice
        self._plan.enqueue(self._ids, self._ids[::-1])

    def finish(self) -> None:
        self._current().synchronize()

    def slowdown(self, choice: Choice) -> float:
        return self._slowdown(self, choice)

    def rate(self, choice: Choice) -> float:
        """From the call to the last byte."""
        seconds = []
        for _ in range(1 + _TIMES):
            self.finish()
            started = time.perf_counter()
            for _ in range(_IN_A_ROW):
                self.start(choice)
            self.finish()
            seconds.append(time.perf_counter() - started)
        return self._bytes * _IN_A_ROW / median(seconds[1:])


class _Decode:
    """A captured stack of matrix-vector products on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        weights = torch.randn((_WIDTH, _WIDTH), dtype=torch.bfloat16, device=device)
        batch = torch.randn((_BATCH, _WIDTH), dtype=torch.bfloat16, device=device)
        self._stream: Any = torch.cuda.Stream(device)
        self._graph: Any = torch.cuda.CUDAGraph()
        self._inputs = weights, batch  # a graph keeps addresses, not tensors
        with torch.cuda.stream(self._stream):
            torch.mm(batch, weights)
            torch.cuda.synchronize(device)
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._outputs = [torch.mm(batch, weights) for _ in range(_MATRICES)]
        self._alone = median(self._step_seconds() for _ in range(5))

    def slowdown(self, bench: Bench, choice: Choice) -> float:
        """How much longer a step takes while copies run, as a fraction."""
        for _ in range(_ENOUGH_COPIES):
            bench.start(choice)
        seconds = self._step_seconds()
        bench.finish()
        return seconds / self._alone - 1

    def _step_seconds(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            begin.record()
            for _ in range(_STEPS):
                self._graph.replay()
            end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / _STEPS / 1e3
