"""Block copy on a GPU: every path beside one big memcpy, the usual alternatives, and what each costs running decode.

Needs only torch, Triton and dynamo_kernels. `quick` measures 16 KiB and 64 KiB alone. With $OUT set, figures also go to
$OUT/gpu_copy.json as they come.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path as FilePath
from statistics import median
from typing import Any

import torch
from dynamo_kernels.block_view import BlockView
from dynamo_kernels.calibration import calibrate, calibrate_fully, chooser_for, table
from dynamo_kernels.choices import Choice, Direction, Path
from dynamo_kernels.fence import ComputeFence, CopyLane, SideStream

from benchmarks.gpu_copy_compressed import compressed
from benchmarks.gpu_copy_rivals import RIVALS, Copy, Field, one_big_memcpy

KIB, MIB = 1 << 10, 1 << 20
#: Half of it moves. (fragment, parts a block): per-layer pages of 32 layers, then cross-layer pages.
BYTES = 512 * MIB
SHAPES = [(4 * KIB, 32), (16 * KIB, 32), (64 * KIB, 32), (256 * KIB, 8), (1 * MIB, 1), (2 * MIB, 1), (4 * MIB, 1)]
REPEATS, IN_FLIGHT, STEPS = 5, 2, 100
#: A copy this slow gets fewer repeats, and is not run beside decode.
SLOW_SECONDS = 0.05


class Decode:
    """A captured step: eight bfloat16 products of 16 rows with 8192 x 8192 weights, 1 GiB through HBM."""

    def __init__(self) -> None:
        weights = [torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
        batch = torch.randn(16, 8192, device="cuda", dtype=torch.bfloat16)
        self.inputs = weights, batch  # a graph keeps addresses, not tensors
        torch.mm(batch, weights[0])
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = [torch.mm(batch, weight) for weight in weights]
        self.alone = median(self.step() for _ in range(7))

    def step(self) -> float:
        """Microseconds."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(STEPS):
            self.graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / STEPS * 1e3


def rate(copy: Copy, stream: Any, num_bytes: int) -> float:
    """GB/s of a few copies in a row, from the first call to the last byte; median. Slow copies are timed less often."""

    def once(copies: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.cuda.stream(stream):
            for _ in range(copies):
                copy()
        stream.synchronize()
        return (time.perf_counter() - started) / copies

    first = once(1)
    seconds = [once(3) for _ in range(REPEATS)] if first < SLOW_SECONDS else [once(1)]
    return num_bytes / median(seconds) / 1e9


def beside_decode(copy: Copy, stream: Any, num_bytes: int, decode: Decode) -> tuple[float, float]:
    """(slow-down of a decode step, GB/s of the copies meanwhile): another thread keeps `IN_FLIGHT` copies queued."""
    stop, begun, ends = threading.Event(), threading.Event(), []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            copy_until_stopped()
        except BaseException as error:  # noqa: BLE001 - raised below; waiting for a copy that never ends took 5 s each
            failed.append(error)
            begun.set()

    def copy_until_stopped() -> None:
        torch.zeros(1, device="cuda")  # a new thread has no context before its first launch, and tensor maps want one
        queued: list[Any] = []
        while not stop.is_set():
            with torch.cuda.stream(stream):
                copy()
                queued.append(stream.record_event())
            if len(queued) > IN_FLIGHT:
                queued.pop(0).synchronize()
                ends.append(time.perf_counter())
                begun.set()
        stream.synchronize()

    before = decode.step()
    worker = threading.Thread(target=work)
    worker.start()
    begun.wait(5)
    since = time.perf_counter()
    steps = [decode.step() for _ in range(3)]
    until = time.perf_counter()
    stop.set()
    worker.join()
    if failed:
        raise failed[0]
    alone = min(before, decode.step())
    inside = [end for end in ends if since <= end <= until]
    moved = (len(inside) - 1) * num_bytes / (inside[-1] - inside[0]) / 1e9 if len(inside) > 1 else 0.0
    return median(steps) / alone - 1, moved


def ours(choice: Choice | None) -> Callable[[Field], Copy]:
    """One of our paths, or the one that is chosen."""

    def build(field: Field) -> Copy:
        from dynamo_kernels.machine import CudaMachine
        from dynamo_kernels.plan import CopyPlan

        chooser = (lambda case: choice) if choice else chooser_for(torch.device("cuda", 0), "")
        plan = CopyPlan(*field.views(), field.direction, CudaMachine(field.hbm.device), chooser)
        ids = field.ids()

        def copy() -> None:
            plan.enqueue(*ids)
            if choice is None:
                field.chosen = plan.decisions[0].choice  # type: ignore[attr-defined]

        return copy

    return build


def contenders(field: Field) -> dict[str, Callable[[Field], Copy]]:
    paths = {
        "ours: chosen": None,
        "ours: dma": Choice(Path.DMA),
        "ours: zero_copy 1 CTA": Choice(Path.ZERO_COPY, 1),
        "ours: zero_copy 2 CTAs": Choice(Path.ZERO_COPY, 2),
    }
    if field.parts > 1:
        for share, ctas in ((0.5, 1), (0.3, 2)):
            paths[f"ours: split {share:.0%} + {ctas} CTA"] = Choice(Path.SPLIT, ctas, share)
        paths["ours: staged"] = Choice(Path.STAGED)
    return {"one big memcpy": one_big_memcpy, **{name: ours(choice) for name, choice in paths.items()}, **RIVALS}


class Report:
    """Lines for people, and everything for $OUT."""

    def __init__(self) -> None:
        folder = os.environ.get("OUT")
        self._file = FilePath(folder, "gpu_copy.json") if folder else None
        self.rows: list[dict[str, Any]] = []

    def add(self, **fields: Any) -> None:
        self.rows.append(fields)
        if self._file is not None:
            self._file.write_text(json.dumps(self.rows, indent=0))


def measure(fields: list[Field], decode: Decode, report: Report) -> None:
    stream = torch.cuda.Stream(priority=-1)
    for field in fields:
        ceiling = 0.0
        print(f"-- {field.direction.value} {field.fragment >> 10} KiB x {field.parts} a block", flush=True)
        for name, build in contenders(field).items():
            try:
                copy = build(field)
            except ImportError:
                print(f"   {name:<28} not installed")
                continue
            (field.hbm if field.loads else field.host).fill_(0xA5)
            with torch.cuda.stream(stream):
                copy()
            stream.synchronize()
            right = name == "one big memcpy" or field.is_copied()
            alone = rate(copy, stream, field.moved_bytes)
            slow = field.moved_bytes / alone / 1e9 > SLOW_SECONDS
            slowdown, moved = (0.0, 0.0) if slow else beside_decode(copy, stream, field.moved_bytes, decode)
            ceiling = ceiling or alone
            wrong = "" if right else "  WRONG BYTES"
            note = f"  {field.chosen}" if name == "ours: chosen" else ""  # type: ignore[attr-defined]
            beside = "too slow to run beside decode" if slow else f"decode {slowdown:+7.1%} at {moved:5.1f} GB/s"
            print(f"   {name:<28} {alone:6.2f} GB/s {alone / ceiling:5.2f}  {beside}{wrong}{note}", flush=True)
            report.add(
                direction=field.direction.value, fragment=field.fragment, parts=field.parts, name=name,
                gb_per_s=alone, of_ceiling=alone / ceiling, decode_slowdown=slowdown, gb_per_s_beside_decode=moved,
                right=right,
            )  # fmt: skip


def launches_beside_a_load(report: Report) -> None:
    """Why a load slows decode: 64 empty kernels in a graph, alone and beside one big memcpy each way."""
    tiny = torch.zeros(32, device="cuda")
    tiny.add_(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(64):
            tiny.add_(1)
    host = torch.empty(BYTES, dtype=torch.uint8, pin_memory=True)
    hbm = torch.empty(BYTES, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    found: dict[str, float] = {}
    for name in ("alone", "beside a load", "beside a store"):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(4 if name != "alone" else 0):
                hbm.copy_(host, non_blocking=True) if "load" in name else host.copy_(hbm, non_blocking=True)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(100):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        found[name] = begin.elapsed_time(end) / 6400 * 1e3
    print("us a launch, 64 empty kernels a graph:", {name: round(value, 3) for name, value in found.items()})
    report.add(name="launch_us", **{name.replace(" ", "_"): value for name, value in found.items()})


def ordering(report: Report, rounds: int = 20) -> None:
    """Blocks written by queued compute, stored at once; blocks loaded, read at once. Then the same with a wait gone."""
    blocks, size = 1024, 64 * KIB
    hbm = torch.zeros((blocks, size), dtype=torch.uint8, device="cuda")
    host = torch.zeros((blocks, size), dtype=torch.uint8, pin_memory=True)
    busy = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    pages, rows = BlockView.of_pages([hbm], [size]), BlockView.of_rows(host, [size])
    from dynamo_kernels.copy import prepare

    store, load, ids = prepare(pages, rows), prepare(rows, pages), list(range(blocks))
    device = hbm.device
    side = SideStream(device)
    cases = (("both waits", 1, 1), ("no fence", 0, 1), ("load not awaited", 1, 0), ("load ahead of its end", 1, 2))
    for name, fenced, finished in cases:
        stale_stores = stale_loads = 0
        for number in range(1, rounds + 1):
            for _ in range(10):
                busy @ busy
            hbm.fill_(number)
            fence = ComputeFence(device)
            with CopyLane(device, fence if fenced else None):
                store.enqueue(ids, ids)
            stale_stores += not bool((host == number).all())
            torch.cuda.synchronize()
            host.fill_(number + 100)
            if finished == 2:  # as the engine's own thread does it, compute still queued before it
                busy @ busy
                load.enqueue(ids, ids)
            else:
                with side.after(ComputeFence(device)):
                    load.enqueue(ids, ids)
                if finished:
                    side.join()
            seen = hbm.clone()  # stands for the attention that reads the loaded blocks
            torch.cuda.synchronize()
            stale_loads += not bool((seen == number + 100).all())
        print(f"ordering, {name}: stale stores {stale_stores}, stale loads {stale_loads} of {rounds}", flush=True)
        report.add(name="ordering", waits=name, stale_stores=stale_stores, stale_loads=stale_loads, rounds=rounds)


def layers(report: Report, rounds: int = 20) -> None:
    """A load of 1 GiB layer by layer, each layer read right behind its own wait. Then the same without the waits."""
    parts, blocks, size = 32, 512, 64 * KIB
    pages = torch.zeros((parts, blocks, size), dtype=torch.uint8, device="cuda")
    host = torch.zeros((blocks, parts * size), dtype=torch.uint8, pin_memory=True)
    host.fill_(7)
    hbm, rows = BlockView.of_pages(list(pages.unbind(0)), [size] * parts), BlockView.of_rows(host, [size] * parts)
    from dynamo_kernels.layered import LayerStream, prepare_layers

    layered, stream, ids = prepare_layers(rows, hbm), LayerStream(pages.device, parts), list(range(blocks))
    seen = torch.empty_like(pages)
    for name in ("each layer waits", "joined at once", "no layer waits"):
        stale, seconds = 0, []
        for _ in range(rounds):
            pages.fill_(0)
            torch.cuda.synchronize()
            started = time.perf_counter()
            copies = layered.copies(ids, ids)
            stream.start(ComputeFence(pages.device), copies)
            seconds.append(time.perf_counter() - started)
            if name == "joined at once":
                stream.join()
            for part in range(parts):
                if name == "each layer waits":
                    stream.wait(part)
                seen[part].copy_(pages[part])  # stands for the layer's attention
            torch.cuda.synchronize()
            took = time.perf_counter() - started
            stale += not bool((seen == 7).all())
            stream.join()
        host_ms, whole_ms = median(seconds) * 1e3, took * 1e3
        print(
            f"by layers, {len(copies)} groups, {name}: stale {stale} of {rounds};"
            f" enqueued in {host_ms:.1f} ms, read after {whole_ms:.1f} ms",
            flush=True,
        )
        report.add(name="by_layers", waits=name, stale=stale, rounds=rounds, host_ms=host_ms, whole_ms=whole_ms)


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return 0
    sys.setswitchinterval(2e-4)
    report = Report()
    device = torch.device("cuda", 0)
    made = calibrate(device, again=True)
    again = calibrate(device, again=True)
    print(f"first start: {len(made.figures)} points in {made.seconds:.2f} s, compiling included", flush=True)
    print(f"with kernels compiled: {len(again.figures)} points in {again.seconds:.2f} s", flush=True)
    report.add(name="calibration", first_seconds=made.seconds, seconds=again.seconds, points=len(made.figures))
    print(table(calibrate_fully(device)), flush=True)
    decode = Decode()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, decode step {decode.alone:.1f} us", flush=True)
    hbm = torch.empty(BYTES, dtype=torch.uint8, device=device)
    host = torch.empty(BYTES, dtype=torch.uint8, pin_memory=True)
    ordering(report)
    layers(report)
    shapes = [shape for shape in SHAPES if shape[0] in (16 * KIB, 64 * KIB)] if "quick" in arguments else SHAPES
    for fragment, parts in shapes:
        for direction in Direction:
            host.copy_(hbm.random_(0, 255))
            measure([Field.of(direction, fragment, parts, hbm, host)], decode, report)
    launches_beside_a_load(report)
    lane = torch.cuda.Stream(priority=-1)
    for entry in compressed(lambda copy, num_bytes: beside_decode(copy, lane, num_bytes, decode)):
        print("compressed:", entry, flush=True)
        report.add(**entry)
    return 0
