"""Why copies slow decode: each half of a copy alone, beside steps that live in HBM, in L2 and in the tensor cores.

A load reads host memory and writes HBM; a store the reverse. Kernels of a few CTAs make one half at a time, at about a
copy's rate. Needs only torch and Triton; with $OUT set, figures also go to $OUT/gpu_contention.json.
"""
# ruff: noqa: N803 - constexpr arguments are written in capitals, as Triton does

from __future__ import annotations

import json
import os
import sys
from pathlib import Path as FilePath
from statistics import median
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.gpu_copy import MIB, STEPS, beside_decode, rate
from benchmarks.gpu_copy_rivals import Copy

BYTES, SMALL = 512 * MIB, 8 * MIB
TILE = 1024
#: Rounds: a few milliseconds.
BUSY = 1_000_000


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def read_only(words, result, tiles, TILE: tl.constexpr, STAGES: tl.constexpr):  # type: ignore[no-untyped-def]
    total = tl.zeros((TILE,), tl.int64)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        total += tl.load(words + tile * TILE + tl.arange(0, TILE), cache_modifier=".cg")
    tl.store(result + tl.program_id(0), tl.sum(total))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def write_only(words, tiles, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        value = tl.zeros((TILE,), tl.int64) + tile
        tl.store(words + tile * TILE + tl.arange(0, TILE), value)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def busy_only(result, rounds, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Holds its multiprocessors and touches no memory."""
    value = tl.arange(0, TILE).to(tl.float32)
    for _ in range(rounds):
        value = value * 1.0001 + 0.5
    tl.store(result + tl.program_id(0), tl.sum(value).to(tl.int64))


class Step:
    """A captured step of products `left @ right`; `step()` is its time in microseconds."""

    def __init__(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], steps: int = STEPS) -> None:
        self._pairs, self._steps = pairs, steps
        torch.mm(*pairs[0])
        torch.cuda.synchronize()
        self._graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = [torch.mm(left, right) for left, right in pairs]
        self.alone = median(self.step() for _ in range(7))

    def step(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self._steps):
            self._graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / self._steps * 1e3


def steps() -> dict[str, Step]:
    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)

    batch, weights = matrix(16, 8192), [matrix(8192, 8192) for _ in range(8)]
    small, small_weight = matrix(16, 2048), matrix(2048, 2048)
    many = matrix(4096, 8192)
    return {
        "HBM (1 GiB of weights)": Step([(batch, weight) for weight in weights]),
        "L2 (8 MiB of weights, 64 times)": Step([(small, small_weight)] * 64),
        "tensor cores (4096 rows)": Step([(many, weights[0])], steps=40),
    }


def halves(hbm: torch.Tensor, host: torch.Tensor) -> dict[str, tuple[Copy, int]]:
    """Name -> (enqueue it, bytes it moves)."""
    result = torch.zeros(256, dtype=torch.int64, device="cuda")
    words = {"HBM": hbm.view(torch.int64), "host": host.view(torch.int64)}
    tiles = BYTES // 8 // TILE

    def load() -> None:
        hbm.copy_(host, non_blocking=True)

    def store() -> None:
        host.copy_(hbm, non_blocking=True)

    def load_into_l2() -> None:
        for start in range(0, BYTES, SMALL):
            hbm[:SMALL].copy_(host[start : start + SMALL], non_blocking=True)

    def store_from_l2() -> None:
        for start in range(0, BYTES, SMALL):
            host[start : start + SMALL].copy_(hbm[:SMALL], non_blocking=True)

    def reads(side: str, ctas: int) -> Copy:
        return lambda: read_only[(ctas,)](words[side], result, tiles, TILE=TILE, STAGES=10, num_warps=4)

    def writes(side: str, ctas: int) -> Copy:
        return lambda: write_only[(ctas,)](words[side], tiles, TILE=TILE, num_warps=4)

    named: dict[str, tuple[Copy, int]] = {
        "one big load": (load, BYTES),
        "load into the same 8 MiB": (load_into_l2, BYTES),
        "one big store": (store, BYTES),
        "store from the same 8 MiB": (store_from_l2, BYTES),
        "2 CTAs held, no memory": (lambda: busy_only[(2,)](result, BUSY, TILE=1024, num_warps=4), 0),
    }
    for ctas in (1, 2, 4):
        named[f"kernel reads the host, {ctas} CTAs"] = reads("host", ctas), BYTES
        named[f"kernel writes the host, {ctas} CTAs"] = writes("host", ctas), BYTES
        named[f"kernel reads HBM, {ctas} CTAs"] = reads("HBM", ctas), BYTES
        named[f"kernel writes HBM, {ctas} CTAs"] = writes("HBM", ctas), BYTES
    return named


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return 0
    sys.setswitchinterval(2e-4)
    hbm = torch.zeros(BYTES, dtype=torch.uint8, device="cuda")
    host = torch.zeros(BYTES, dtype=torch.uint8, pin_memory=True)
    stream = torch.cuda.Stream(priority=-1)
    rows: list[dict[str, Any]] = []
    made = steps()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    print("steps:", *(f"{name}: {step.alone:.1f} us;" for name, step in made.items()), flush=True)
    for name, (copy, size) in halves(hbm, host).items():
        with torch.cuda.stream(stream):
            copy()
        stream.synchronize()
        alone = rate(copy, stream, size or BYTES) if size else 0.0
        found = {kind: beside_decode(copy, stream, size, step) for kind, step in made.items()}  # type: ignore[arg-type]
        text = "  ".join(f"{kind.split()[0]} {slower:+6.1%} at {moved:5.1f}" for kind, (slower, moved) in found.items())
        print(f"   {name:<34} {alone:6.2f} GB/s  {text}", flush=True)
        rows.append({"name": name, "gb_per_s": alone, "beside": found})
        if folder := os.environ.get("OUT"):
            FilePath(folder, "gpu_contention.json").write_text(json.dumps(rows, indent=0))
    return 0
