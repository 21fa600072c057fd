"""Times every path on this GPU, and how much decode slows down meanwhile: small copies, two seconds in all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from dynamo_kernels.block_view import BlockView
from dynamo_kernels.choices import ENGINES_ALONE_BYTES, Case, Choice, Direction, Figure, Path, Point
from dynamo_kernels.machine import CudaMachine
from dynamo_kernels.plan import CopyPlan

#: What is not measured by then is not measured; the nearest point that was stands for it.
_BUDGET_SECONDS = 1.8
_MOST_BYTES, _MOST_FRAGMENTS, _FEW_FRAGMENTS = 64 << 20, 4096, 64
_TIMES = 2
#: A transfer is longer than these copies: several in a row hide what happens once a call.
_IN_A_ROW = 2
#: (fragment, parts a block), the most telling first.
_SHAPES = ((16 << 10, 32), (64 << 10, 32), (2 << 20, 1), (4 << 10, 32))
#: As long as the decode steps that are timed beside them.
_ENOUGH_COPIES = 5
_CANDIDATES = (
    Choice(Path.DMA),
    Choice(Path.ZERO_COPY, ctas=2),
    Choice(Path.SPLIT, ctas=1, dma_share=0.5),
    Choice(Path.STAGED),
)
_OF_ONE_PART = (Path.DMA, Path.ZERO_COPY)
#: Decode of a dense model is a stream of weights through HBM: 128 MiB of them, read four times a step.
_WIDTH, _BATCH, _MATRICES, _STEPS = 8192, 16, 4, 30


@dataclass
class _Memory:
    hbm: torch.Tensor
    host: torch.Tensor
    machine: CudaMachine


def measure(device: torch.device) -> dict[Point, tuple[Figure, ...]]:
    """Figures for both directions, few and many fragments, parts at equal distances (lines) or not."""
    memory = _Memory(
        torch.zeros(_MOST_BYTES, dtype=torch.uint8, device=device),
        torch.zeros(_MOST_BYTES, dtype=torch.uint8, pin_memory=True),
        CudaMachine(device),
    )
    lane = torch.cuda.Stream(device, priority=-1)
    decode = _Decode(device)
    found: dict[Point, tuple[Figure, ...]] = {}
    started = time.perf_counter()
    for point, parts in _points():
        if time.perf_counter() - started > _BUDGET_SECONDS:
            break
        with torch.cuda.stream(lane):
            found[point] = _measure_point(point, parts, memory, decode)
    torch.cuda.synchronize(device)
    return found


def _points() -> Iterator[tuple[Point, int]]:
    for fragment, parts in _SHAPES:
        for direction in Direction:
            many = min(_MOST_FRAGMENTS, _MOST_BYTES // fragment)
            # Only short parts are copied as lines, so only for them the distances matter.
            for has_lines in (True, False) if parts > 1 and fragment < ENGINES_ALONE_BYTES else (parts > 1,):
                yield Point(direction, fragment, many, has_lines), parts
            if fragment == _SHAPES[0][0]:
                yield Point(direction, fragment, _FEW_FRAGMENTS, True), parts


def _measure_point(point: Point, parts: int, memory: _Memory, decode: _Decode) -> tuple[Figure, ...]:
    bench = _Bench(point, parts, memory)
    rates = [(choice, bench.rate(choice)) for choice in _CANDIDATES if parts > 1 or choice.path in _OF_ONE_PART]
    promising = 0.8 * max(rate for _, rate in rates)
    many = point.fragments > _FEW_FRAGMENTS or parts == 1
    return tuple(
        Figure(choice, rate, decode.slowdown(bench, choice) if many and rate >= promising else None)
        for choice, rate in rates
    )


class _Bench:
    """One point's views and ids: pages of the parts at equal distances, or with two parts exchanged."""

    def __init__(self, point: Point, parts: int, memory: _Memory) -> None:
        blocks = point.fragments // parts
        size = blocks * parts * point.fragment_bytes
        pages = list(memory.hbm[:size].view(parts, blocks, point.fragment_bytes).unbind(0))
        if not point.has_lines and parts > 1:
            pages[0], pages[1] = pages[1], pages[0]
        sizes = [point.fragment_bytes] * parts
        hbm = BlockView.of_pages(pages, sizes)
        rows = BlockView.of_rows(memory.host[:size].view(blocks, -1), sizes)
        views = (hbm, rows) if point.direction is Direction.D2H else (rows, hbm)
        self._choice = Choice(Path.DMA)
        self._plan = CopyPlan(*views, point.direction, memory.machine, self._chosen)
        self._bytes = size
        # Neighbours must not be copied as one: every other block first, then the rest.
        self._ids = list(range(0, blocks, 2)) + list(range(1, blocks, 2))

    def _chosen(self, case: Case) -> Choice:
        return self._choice

    def start(self, choice: Choice) -> None:
        self._choice = choice
        self._plan.enqueue(self._ids, self._ids[::-1])

    def rate(self, choice: Choice) -> float:
        """Bytes a second as a caller sees them: from the call to the last byte."""
        seconds = []
        for _ in range(1 + _TIMES):
            torch.cuda.current_stream().synchronize()
            started = time.perf_counter()
            for _ in range(_IN_A_ROW):
                self.start(choice)
            torch.cuda.current_stream().synchronize()
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

    def slowdown(self, bench: _Bench, choice: Choice) -> float:
        """How much longer a step takes while copies run, as a fraction."""
        for _ in range(_ENOUGH_COPIES):
            bench.start(choice)
        seconds = self._step_seconds()
        torch.cuda.current_stream().synchronize()
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
