"""Stores by TMA on a GPU: what calibration makes of them, every byte at odd sizes from a fresh thread, and their order.

Needs only torch, Triton and dynamo_kernels. Rates and decode are `gpu_copy_shapes kinds=tma`.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from dynamo_kernels.block_view import BlockView
from dynamo_kernels.calibration import calibrate, calibrate_fully, table
from dynamo_kernels.choices import Case, Choice, Direction, Path
from dynamo_kernels.copy import PATH_SETTING
from dynamo_kernels.machine import CudaMachine
from dynamo_kernels.plan import CopyPlan

from benchmarks.gpu_copy import Report, ordering

KIB = 1 << 10
CANARY = 0xA5
#: Whole tiles, several, and what TMA must leave to others.
FRAGMENTS = [16, 32, 48, 64, 80, 208, 1024, 4096, 4, 20, 18]
BLOCKS = 24


@dataclass(frozen=True)
class Shape:
    fragment: int
    parts: int
    #: Bytes between fragments on both sides; a multiple of 128 suits TMA.
    gap: int
    ctas: int

    def store(self, device: torch.device) -> tuple[bool, bool]:
        """(by TMA, whether the host has every byte and no other changed)."""
        pitch = self.fragment + self.gap
        pages = torch.randint(0, 256, (self.parts, BLOCKS, pitch), dtype=torch.uint8, device=device)
        rows = torch.full((BLOCKS, self.parts * pitch), CANARY, dtype=torch.uint8, pin_memory=True)
        hbm = BlockView(tuple(pages[part, :, : self.fragment] for part in range(self.parts)))
        starts = [part * pitch for part in range(self.parts)]
        host = BlockView(tuple(rows[:, start : start + self.fragment] for start in starts))
        ids = [np.random.default_rng(3).permutation(BLOCKS)[: BLOCKS // 2] for _ in range(2)]
        ids[1] = BLOCKS - 1 - ids[1]

        def chosen(case: Case) -> Choice:
            return Choice(Path.TMA if case.allows(Path.TMA) else Path.ZERO_COPY, self.ctas)

        expected = rows.clone()
        for source, target in zip(*ids, strict=True):
            for part, start in enumerate(starts):
                expected[target, start : start + self.fragment] = pages[part, source, : self.fragment].cpu()
        plan = CopyPlan(hbm, host, Direction.D2H, CudaMachine(device), chosen)
        torch.cuda.synchronize()
        self._from_a_fresh_thread(plan, ids)
        return plan.decisions[0].choice.path is Path.TMA, torch.equal(rows, expected)

    @staticmethod
    def _from_a_fresh_thread(plan: CopyPlan, ids: list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]]) -> None:
        """As the connector's copy thread does it, whose first CUDA call this is."""
        failed: list[BaseException] = []

        def work() -> None:
            try:
                plan.enqueue(ids[0], ids[1])
                torch.cuda.current_stream().synchronize()
            except BaseException as error:  # noqa: BLE001 - raised by the caller
                failed.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]


def every_byte(report: Report, device: torch.device) -> None:
    shapes = [
        Shape(size * KIB, parts, gap, ctas)
        for (size, parts, gap), ctas in zip(product(FRAGMENTS, (1, 3), (0, 128, 16)), [1, 2, 3] * 100, strict=False)
    ]
    results = [(shape, *shape.store(device)) for shape in shapes]
    wrong = [shape for shape, _, right in results if not right]
    taken = sum(by_tma for _, by_tma, _ in results)
    print(f"bytes: {len(shapes)} shapes, {taken} by TMA, {len(wrong)} wrong {wrong[:5]}", flush=True)
    report.add(name="bytes", shapes=len(shapes), by_tma=taken, wrong=[str(shape) for shape in wrong])


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return 0
    device, report = torch.device("cuda", 0), Report()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    every_byte(report, device)
    os.environ[PATH_SETTING] = Path.TMA.value
    ordering(report, rounds=10)
    del os.environ[PATH_SETTING]
    first = calibrate(device, again=True)
    print(f"first start: {len(first.figures)} points in {first.seconds:.2f} s, compiling included", flush=True)
    second = calibrate(device, again=True)
    print(f"with kernels compiled: {len(second.figures)} points in {second.seconds:.2f} s", flush=True)
    print(table(calibrate_fully(device)), flush=True)
    return 0
