"""Shapes of the block copy that the product lacks, beside those that it has: TMA, more engines, gentler staging.

Needs only torch, Triton and dynamo_kernels. `kinds=ours,bulk,tensor,words,tma` picks some (a kernel that fails on the
GPU takes its process with it), `only=d2h` one direction, `rounds=N` (2) measures all N times, `seconds=N` (150) stops
in time; with $OUT set, figures also go to $OUT/gpu_copy_shapes-KINDS.json as they come.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from statistics import median
from typing import Any
from unittest import mock

import torch
from dynamo_kernels import machine as product_machine
from dynamo_kernels import plan as product_plan
from dynamo_kernels.choices import Choice, Direction, Path
from dynamo_kernels.dma import Fragments
from dynamo_kernels.machine import CudaMachine, Kernel, KernelCopy
from dynamo_kernels.plan import CopyPlan

from benchmarks.gpu_copy import Decode, beside_decode, ours, rate
from benchmarks.gpu_copy_kernels import bulk_copies, registers, tma_descriptors
from benchmarks.gpu_copy_rivals import Copy, Field, one_big_memcpy, twelve_ctas

KIB, MIB = 1 << 10, 1 << 20
BYTES = 512 * MIB
Build = Callable[[Field], Copy]
#: Of these, fragments of 64 KiB are measured too.
WITH_LONGER = ("dma", "as it is", "TMA bulk 16", "tma", "zero_copy 2", "chosen")


@dataclass(frozen=True)
class Tuning:
    """How a copy departs from the product's."""

    choice: Choice
    #: Streams that the copy engines' work is dealt to.
    engines: int = 1
    #: Kernel, CTAs and pipeline stages of staging's gather or scatter.
    kernel: Kernel = Kernel.DIRECT
    ctas: int = 0
    stages: int = 6
    buffer: int = 16 * MIB
    buffers: int = 2


class TunedMachine(CudaMachine):
    def __init__(self, device: torch.device, tuning: Tuning) -> None:
        super().__init__(device)
        self._tuning = tuning
        self._lanes = [torch.cuda.Stream(device, priority=-1) for _ in range(tuning.engines - 1)]

    def launch(self, copy: KernelCopy, stream: Any) -> None:
        tuning = self._tuning
        if copy.kernel is Kernel.DIRECT:
            copy = replace(copy, kernel=tuning.kernel, ctas=tuning.ctas)
        with mock.patch.dict(product_machine._STAGES, dict.fromkeys((Kernel.PIPELINED, Kernel.TMA), tuning.stages)):
            super().launch(copy, stream)

    def copy_lines(self, table: Any, stream: Any) -> None:
        self._deal(len(table), stream, lambda some, lane: self._driver.copy_lines(table[some], lane.cuda_stream))

    def copy_fragments(self, table: Fragments, stream: Any) -> None:
        def copy(some: slice, lane: Any) -> None:
            part = Fragments(table.srcs[some], table.dsts[some], table.sizes[some])
            self._driver.copy_fragments(part, lane.cuda_stream)

        self._deal(len(table.sizes), stream, copy)

    def _deal(self, count: int, stream: Any, copy: Callable[[slice, Any], None]) -> None:
        """Small hands in turn: an engine that starts late must not end late."""
        lanes = [stream, *self._lanes]
        begun = stream.record_event()
        for lane in self._lanes:
            lane.wait_event(begun)
        hand = count if len(lanes) == 1 else 16
        for number, start in enumerate(range(0, count, hand)):
            copy(slice(start, min(count, start + hand)), lanes[number % len(lanes)])
        for lane in self._lanes:
            stream.wait_event(lane.record_event())


def tuned(tuning: Tuning) -> Build:
    def build(field: Field) -> Copy:
        made = TunedMachine(field.hbm.device, tuning)
        plan, ids = CopyPlan(*field.views(), field.direction, made, lambda case: tuning.choice), field.ids()
        with (
            mock.patch.object(product_plan, "_STAGING_BYTES", tuning.buffer),
            mock.patch.object(product_plan, "_BUFFERS", tuning.buffers),
        ):
            plan.enqueue(*ids)  # makes the staging buffers
        torch.cuda.synchronize()

        def copy() -> None:
            with mock.patch.object(product_plan, "_BUFFERS", tuning.buffers):
                plan.enqueue(*ids)

        return copy

    return build


def staged(**settings: Any) -> Build:
    return tuned(Tuning(Choice(Path.STAGED), **settings))


def engines_and_kernels() -> dict[str, Build]:
    """What our paths become when their numbers change."""
    lines = {f"dma, {count} streams": tuned(Tuning(Choice(Path.DMA), engines=count)) for count in (1, 2, 3, 4)}
    gather: dict[str, Build] = {
        "staged (as it is)": ours(Choice(Path.STAGED)),
        "staged, 3 x 16 MiB": staged(buffers=3),
        "staged, 2 x 32 MiB": staged(buffer=32 * MIB),
        "staged, 3 x 32 MiB, 2 streams": staged(buffer=32 * MIB, buffers=3, engines=2),
        "staged, gather by 32 CTAs": staged(ctas=32),
        "staged, gather by 16 CTAs": staged(ctas=16),
        "staged, gather by 8 CTAs": staged(ctas=8),
        "staged, gather by 4 CTAs, pipeline": staged(ctas=4, kernel=Kernel.PIPELINED),
        "staged, gather by 8 CTAs, pipeline": staged(ctas=8, kernel=Kernel.PIPELINED),
        "staged, 3 x 32 MiB, 8 CTAs, pipeline": staged(buffer=32 * MIB, buffers=3, ctas=8, kernel=Kernel.PIPELINED),
        "staged, 3 x 8 MiB, 8 CTAs, pipeline": staged(buffer=8 * MIB, buffers=3, ctas=8, kernel=Kernel.PIPELINED),
    }
    kernel: dict[str, Build] = {
        "zero_copy 2 CTAs (as it is)": ours(Choice(Path.ZERO_COPY, 2)),
        "zero_copy 3 CTAs": ours(Choice(Path.ZERO_COPY, 3)),
        "zero_copy 4 CTAs, 3 stages": tuned(Tuning(Choice(Path.ZERO_COPY, 4), stages=3)),
        "zero_copy 8 CTAs, 2 stages": tuned(Tuning(Choice(Path.ZERO_COPY, 8), stages=2)),
        "split 70% of 2 streams + 1 CTA": tuned(Tuning(Choice(Path.SPLIT, 1, 0.7), engines=2)),
        "split 50% + 1 CTA": ours(Choice(Path.SPLIT, 1, 0.5)),
    }
    return {**lines, **gather, **kernel}


def bulk_shapes() -> dict[str, Build]:
    return {
        f"TMA bulk {chunk} KiB x {stages}, {ctas} CTAs{', evict first' * first}": bulk_copies(
            ctas, chunk * KIB, stages, lag, first
        )
        for ctas, chunk, stages, lag, first in (
            (1, 16, 8, 2, False), (2, 16, 4, 1, False), (2, 16, 6, 2, False), (3, 16, 4, 1, False),
            (4, 16, 3, 1, False), (4, 8, 4, 1, False), (8, 8, 3, 1, False), (8, 4, 4, 1, False), (16, 4, 3, 1, False),
            (2, 16, 6, 2, True), (4, 8, 4, 1, True),
        )
    }  # fmt: skip


def tma_shapes() -> dict[str, Build]:
    """The product's stores by TMA, beside what calibration weighs them against."""
    others = {"dma": Choice(Path.DMA), "staged": Choice(Path.STAGED), "split 50% + 1 CTA": Choice(Path.SPLIT, 1, 0.5)}
    kernels = {"zero_copy 2 CTAs": Choice(Path.ZERO_COPY, 2), "tma 2 CTAs (as it is)": Choice(Path.TMA, 2)}
    return {
        **{name: ours(choice) for name, choice in {**others, **kernels}.items()},
        **{
            f"tma {ctas} CTAs, {stages} stages": tuned(Tuning(Choice(Path.TMA, ctas), stages=stages))
            for ctas, stages in ((1, 12), (2, 4), (2, 12), (3, 6))
        },
        "TMA bulk 16 KiB x 4, 2 CTAs": bulk_copies(2, 16 * KIB, 4, 1),
        "chosen by calibration": ours(None),
    }


def tensor_shapes() -> dict[str, Build]:
    return {
        f"TMA descriptor 16 KiB x {stages}, {ctas} CTAs": tma_descriptors(ctas, stages)
        for ctas, stages in ((2, 12), (4, 8), (6, 6))
    }


def word_shapes() -> dict[str, Build]:
    words = {
        f"registers {tile} KiB, {ctas} CTAs{modifier}": registers(ctas, tile * KIB, warps, modifier)
        for ctas, tile, warps, modifier in (
            (4, 8, 4, ""), (4, 8, 4, ".cs"), (4, 8, 4, ".wt"), (6, 8, 4, ""), (8, 8, 4, ""), (12, 8, 4, ""),
            (16, 4, 2, ""), (24, 4, 2, ""), (32, 2, 1, ""),
        )
    }  # fmt: skip
    return {**words, "12 CTAs, 8-byte words": twelve_ctas}


KINDS = {
    "ours": engines_and_kernels,
    "bulk": bulk_shapes,
    "tensor": tensor_shapes,
    "words": word_shapes,
    "tma": tma_shapes,
}


@dataclass
class Runs:
    """What one shape showed, a figure a round."""

    rates: list[float] = field(default_factory=list)
    slowdowns: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    right: bool = True
    error: str = ""

    def as_fields(self) -> dict[str, Any]:
        middle = (median(each) if each else 0.0 for each in (self.rates, self.slowdowns, self.beside))
        names = ("gb_per_s", "decode_slowdown", "gb_per_s_beside_decode")
        return {**dict(zip(names, middle, strict=True)), **self.__dict__}


class Sweep:
    """One direction and fragment: every shape once a round, one big memcpy first."""

    def __init__(self, place: Field, decode: Decode, shapes: dict[str, Build]) -> None:
        self.place, self._decode, self._shapes = place, decode, {"one big memcpy": one_big_memcpy, **shapes}
        self.runs = {name: Runs() for name in self._shapes}
        self._copies: dict[str, Copy] = {}
        self._stream = torch.cuda.Stream(priority=-1)

    def round(self, ends: float) -> None:
        for name, runs in self.runs.items():
            if runs.error or time.monotonic() > ends:
                continue
            try:
                self._measure(name, runs)
            except Exception as error:  # noqa: BLE001 - one shape that fails is a finding, not the end of the sweep
                runs.error = f"{type(error).__name__}: {error}"[:300]
                print(f"   {name:<40} {runs.error}", flush=True)

    def _measure(self, name: str, runs: Runs) -> None:
        place = self.place
        (place.hbm if place.loads else place.host).fill_(0xA5)
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            if name not in self._copies:
                self._copies[name] = self._shapes[name](place)
            copy = self._copies[name]
            copy()
        self._stream.synchronize()
        if name != "one big memcpy" and not runs.rates:
            runs.right = place.is_copied()
        runs.rates.append(rate(copy, self._stream, place.moved_bytes))
        slower, moved = beside_decode(copy, self._stream, place.moved_bytes, self._decode)
        runs.slowdowns.append(slower)
        runs.beside.append(moved)
        self._print(name, runs)

    def _print(self, name: str, runs: Runs) -> None:
        share = runs.rates[-1] / self.runs["one big memcpy"].rates[-1]
        beside = f"decode {runs.slowdowns[-1]:+7.1%} at {runs.beside[-1]:5.1f} GB/s"
        wrong = "" if runs.right else "  WRONG BYTES"
        note = f"  {self.place.chosen}" if name.startswith("chosen") else ""  # type: ignore[attr-defined]
        print(f"   {name:<40} {runs.rates[-1]:6.2f} GB/s {share:5.3f}  {beside}{wrong}{note}", flush=True)


def verdict(sweep: Sweep) -> list[str]:
    """The shapes that pass 0.95, those that pass 0.90, and the gentlest: what the figures say in four lines."""
    ceilings = sweep.runs["one big memcpy"].rates
    if not ceilings:
        return ["   not measured"]
    ceiling = median(ceilings)
    good = {
        name: (median(runs.rates) / ceiling, median(runs.slowdowns))
        for name, runs in sweep.runs.items()
        if runs.rates and runs.slowdowns and runs.right and name != "one big memcpy"
    }
    lines = []
    for least in (0.95, 0.9):
        near = sorted((slower, name, share) for name, (share, slower) in good.items() if share >= least)
        lines += [f"   >= {least}: {name} {share:.3f}, decode {slower:+.1%}" for slower, name, share in near[:4]]
    return lines


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return 0
    options = dict(argument.split("=", 1) for argument in arguments)
    ends = time.monotonic() + float(options.get("seconds", 150))
    sys.setswitchinterval(2e-4)
    device = torch.device("cuda", 0)
    hbm = torch.empty(BYTES, dtype=torch.uint8, device=device)
    host = torch.empty(BYTES, dtype=torch.uint8, pin_memory=True)
    decode = Decode()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, decode step {decode.alone:.1f} us", flush=True)
    kinds = options.get("kinds", ",".join(KINDS)).split(",")
    shapes = {name: build for kind in kinds for name, build in KINDS[kind]().items()}
    few = {name: build for name, build in shapes.items() if any(word in name for word in WITH_LONGER)}
    host.copy_(hbm.random_(0, 255))
    sweeps = [
        Sweep(Field.of(direction, fragment, 32, hbm, host), decode, shapes if fragment == 16 * KIB else few)
        for fragment in (16 * KIB, 64 * KIB)
        for direction in (Direction.D2H, Direction.H2D)
        if direction.value == options.get("only", direction.value)
    ]
    for number in range(int(options.get("rounds", 2))):
        for sweep in sweeps:
            place = sweep.place
            print(f"-- round {number}: {place.direction.value} {place.fragment >> 10} KiB x {place.parts}", flush=True)
            host.copy_(hbm.random_(0, 255))
            sweep.round(ends)
            _save(sweeps, "-".join(kinds))
    for sweep in sweeps:
        place = sweep.place
        print(f"== {place.direction.value} {place.fragment >> 10} KiB", *verdict(sweep), sep="\n", flush=True)
    return 0


def _save(sweeps: list[Sweep], kinds: str) -> None:
    if folder := os.environ.get("OUT"):
        rows = []
        for sweep in sweeps:
            of = {"direction": sweep.place.direction.value, "fragment": sweep.place.fragment}
            rows += [{**of, "name": name, **runs.as_fields()} for name, runs in sweep.runs.items()]
        FilePath(folder, f"gpu_copy_shapes-{kinds}.json").write_text(json.dumps(rows, indent=0))
