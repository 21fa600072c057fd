"""What waiting for a load layer by layer could gain: prefill of a new suffix beside the load of its prefix.

Layers of Llama-3.1-8B's shape in plain torch; the prefix's KV comes from pinned memory by our own copies, fragments of
64 KiB. Four ways: the load, the layers, one after the other, and each layer waiting for its part of the load (1 to 32
parts). The last is what an engine could reach, and only outside full CUDA graphs: those wait once, before they start.
Needs torch, Triton and dynamo_kernels; with $OUT set, figures also go to $OUT/gpu_layerwise.json.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path as FilePath
from statistics import median
from typing import Any

import torch
import torch.nn.functional as functional
from dynamo_kernels import BlockView
from dynamo_kernels.choices import Choice, Direction, Path
from dynamo_kernels.machine import CudaMachine
from dynamo_kernels.plan import CopyPlan

LAYERS, HIDDEN, MLP, HEADS, KV_HEADS, HEAD = 32, 4096, 14336, 32, 8, 128
#: Tokens a block, and bytes of one block in one layer: keys and values of 8 heads of 128 in bfloat16.
BLOCK, FRAGMENT = 16, 64 << 10
#: (tokens that are loaded, tokens that are new): a prompt asked again, turns of a chat, a long new text.
CASES = [(32768, 16), (32768, 512), (8192, 512), (8192, 2048), (16384, 2048), (16384, 4096)]
GROUPS = (1, 4, 8, 32)
REPEATS = 3


class Model:
    """One set of weights used by all layers: 436 MB, too much for L2."""

    def __init__(self) -> None:
        def matrix(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * rows**-0.5

        self._qkv, self._out = matrix(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD), matrix(HIDDEN, HIDDEN)
        self._up, self._down = matrix(HIDDEN, 2 * MLP), matrix(MLP, HIDDEN)

    def layer(self, hidden: torch.Tensor, kv: torch.Tensor, wait: Callable[[], None]) -> torch.Tensor:
        """`kv`: (tokens, 2, KV_HEADS, HEAD), the new ones last. Waits where an engine's layer does."""
        new = len(hidden)
        query, keys_and_values = (hidden @ self._qkv).split([HEADS * HEAD, 2 * KV_HEADS * HEAD], -1)
        wait()
        kv[-new:].copy_(keys_and_values.view(new, 2, KV_HEADS, HEAD))
        # No mask among the new tokens: it would change the work by little, and flash attention wants none.
        seen = functional.scaled_dot_product_attention(
            query.view(1, new, HEADS, HEAD).transpose(1, 2),
            kv[None, :, 0].transpose(1, 2),
            kv[None, :, 1].transpose(1, 2),
            enable_gqa=True,
        )
        hidden = hidden + seen.transpose(1, 2).reshape(new, HIDDEN) @ self._out
        gate, up = (hidden @ self._up).chunk(2, -1)
        return hidden + (functional.silu(gate) * up) @ self._down


class Memory:
    """Enough for the largest case, made once."""

    def __init__(self) -> None:
        loaded, both = max(case[0] for case in CASES), max(sum(case) for case in CASES)
        self.rows = torch.zeros((loaded // BLOCK, LAYERS * FRAGMENT), dtype=torch.uint8, pin_memory=True)
        self.pages = torch.zeros((LAYERS, both // BLOCK, FRAGMENT), dtype=torch.uint8, device="cuda")


class Loads:
    """Blocks of rows in pinned memory, copied a group of layers at a time, enqueued by a thread of their own."""

    def __init__(self, memory: Memory, loaded: int, groups: int) -> None:
        self._memory, self.per_group, self.bytes = memory, LAYERS // groups, loaded // BLOCK * LAYERS * FRAGMENT
        made = CudaMachine(memory.pages.device)
        self._plans = [self._plan(made, start) for start in range(0, LAYERS, self.per_group)]
        self._ids = [torch.randperm(loaded // BLOCK).numpy() for _ in range(2)]
        self._stream = torch.cuda.Stream(priority=-1)
        self._ends: list[Any] = []
        self._enqueued: list[threading.Event] = []
        self._worker = threading.Thread()

    def _plan(self, made: CudaMachine, start: int) -> CopyPlan:
        sizes, some = [FRAGMENT] * self.per_group, slice(start * FRAGMENT, (start + self.per_group) * FRAGMENT)
        pages = BlockView.of_pages(list(self._memory.pages[start : start + self.per_group].unbind(0)), sizes)
        rows = BlockView.of_rows(self._memory.rows[:, some], sizes)
        path = Path.STAGED if self.per_group > 1 else Path.DMA  # what our rules choose, or may choose
        return CopyPlan(rows, pages, Direction.H2D, made, lambda case: Choice(path))

    def start(self, after: Any) -> None:
        self._stream.wait_event(after.record_event())
        self._ends, self._enqueued = [], [threading.Event() for _ in self._plans]
        self._worker = threading.Thread(target=self._enqueue)
        self._worker.start()

    def _enqueue(self) -> None:
        try:
            with torch.cuda.stream(self._stream):
                for plan, enqueued in zip(self._plans, self._enqueued, strict=True):
                    plan.enqueue(*self._ids)
                    self._ends.append(self._stream.record_event())
                    enqueued.set()
        finally:
            for enqueued in self._enqueued:  # nobody waits for a copy that failed
                enqueued.set()

    def hold(self, stream: Any, layer: int) -> None:
        """An event must be recorded before a stream can wait for it: so far the host waits too."""
        group = layer // self.per_group
        self._enqueued[group].wait()
        stream.wait_event(self._ends[group])

    def end(self) -> None:
        self._worker.join()


def timed(work: Callable[[], None]) -> float:
    """Milliseconds from an idle GPU to an idle GPU; median."""
    seen = []
    for _ in range(1 + REPEATS):
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        seen.append(begin.elapsed_time(end))
    return float(median(seen[1:]))


def measure(model: Model, memory: Memory, shape: tuple[int, int], groups: int) -> dict[str, float]:
    """Milliseconds of the load, of the layers, of one after the other and of layers that wait one by one."""
    (loaded, new), compute = shape, torch.cuda.current_stream()
    loads = Loads(memory, loaded, groups)
    hidden = torch.randn(new, HIDDEN, device="cuda", dtype=torch.bfloat16)
    kv = memory.pages.view(torch.bfloat16).view(LAYERS, -1, 2, KV_HEADS, HEAD)[:, : loaded + new]

    def layers(wait: Callable[[int], None]) -> None:
        seen = hidden
        for number in range(LAYERS):
            seen = model.layer(seen, kv[number], partial(wait, number))

    def nothing(layer: int) -> None:
        """Nothing is waited for."""

    def load() -> None:
        loads.start(compute)
        loads.hold(compute, LAYERS - 1)
        loads.end()

    def one_wait() -> None:
        load()
        layers(nothing)

    def a_wait_a_layer() -> None:
        loads.start(compute)
        layers(partial(loads.hold, compute))
        loads.end()

    ways = {"load": load, "layers": partial(layers, nothing), "one_wait": one_wait, "layerwise": a_wait_a_layer}
    return {"gb": loads.bytes / 1e9, **{name: timed(way) for name, way in ways.items()}}


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return 0
    sys.setswitchinterval(2e-4)
    model, memory = Model(), Memory()
    rows: list[dict[str, float]] = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; milliseconds", flush=True)
    with torch.inference_mode():
        for (loaded, new), groups in product(CASES, GROUPS):
            found = measure(model, memory, (loaded, new), groups)
            small, large = sorted((found["load"], found["layers"]))
            bound = large + small / groups
            rows.append({"loaded": loaded, "new": new, "groups": groups, "bound": bound, **found})
            print(
                f"   {loaded:>6} loaded, {new:>5} new, {groups:>2} waits: load {found['load']:6.1f}"
                f" ({found['gb'] / found['load'] * 1e3:4.1f} GB/s)  layers {found['layers']:6.1f}"
                f"  one after the other {found['one_wait']:6.1f}  layer by layer {found['layerwise']:6.1f}"
                f" ({found['layerwise'] / found['one_wait'] - 1:+.0%})  bound {bound:6.1f}",
                flush=True,
            )
            if folder := os.environ.get("OUT"):
                FilePath(folder, "gpu_layerwise.json").write_text(json.dumps(rows, indent=0))
    return 0
