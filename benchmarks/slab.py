"""The NVMe slab against its disk: 2 MiB blocks with header, xxh3 and index log, beside bare O_DIRECT loops and dd.

Options: the directory to use (default: the system's temporary one), which must take direct I/O. The sides take turns.
Also the time to open a slab again, with a log as full as 100 GB and as a million slots make it.
"""

from __future__ import annotations

import gc
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path

import numpy as np

from dynamo_connectors.blocks import BlockKey, Namespace
from dynamo_connectors.lanes import Lane
from dynamo_connectors.tiers.base import Batch, Place
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.tiers.index_log import IndexLog
from dynamo_connectors.tiers.nvme import NvmeStore, slot_bytes
from dynamo_connectors.tiers.nvme_lanes import QUEUE_DEPTH, NvmeTier
from dynamo_connectors.tiers.slab_format import Fact, encode_fact, encode_log_header

BLOCK_BYTES, BLOCKS, ROUNDS = 2 << 20, 512, 7
TARGET = 0.9
SPACE = Namespace("bench", "m", "r", "d", "l", 16)
KEYS = [BlockKey(f"{number:032d}".encode()) for number in range(BLOCKS)]


class Ours:
    """The slab as the transfer engine uses it, from and to rows of host memory."""

    def __init__(self, directory: Path, rows: DramStore, back: DramStore) -> None:
        self.store = NvmeStore(directory, BLOCKS, BLOCK_BYTES, SPACE)
        self.tier = NvmeTier(self.store)
        self.places = [Place(key, slot) for slot, key in enumerate(KEYS)]
        self.rows = [memoryview(row) for row in rows.rows]
        self.back = [memoryview(row) for row in back.rows]

    def write(self) -> None:
        self._await(self.tier.write(self.places, self.rows))

    def read(self) -> None:
        self._await(self.tier.read(self.places, self.back))

    @staticmethod
    def _await(batches: list[Batch]) -> None:
        errors = [error for batch in batches for error in batch.outcome.result() if error is not None]
        assert not errors, errors[0]


class Bare:
    """What the disk does for as many threads that only read and write blocks."""

    def __init__(self, path: Path, rows: DramStore, back: DramStore) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        os.posix_fallocate(self.fd, 0, BLOCKS * BLOCK_BYTES)
        self.lane = Lane("bare", QUEUE_DEPTH)
        self.rows, self.back = rows.rows, back.rows

    def write(self) -> None:
        self._each(lambda number: os.pwrite(self.fd, memoryview(self.rows[number]), number * BLOCK_BYTES))

    def read(self) -> None:
        self._each(lambda number: os.preadv(self.fd, [memoryview(self.back[number])], number * BLOCK_BYTES))

    def _each(self, call: Callable[[int], int]) -> None:
        tasks = [self.lane.submit(lambda number=number: call(number)) for number in range(BLOCKS)]  # type: ignore[misc]
        wait(tasks)
        assert all(task.result() == BLOCK_BYTES for task in tasks)

    def dd_write(self) -> None:
        self._dd(f"of={self.path}", "oflag=direct", "if=/dev/zero")

    def dd_read(self) -> None:
        self._dd(f"if={self.path}", "iflag=direct", "of=/dev/null")

    def _dd(self, *options: str) -> None:
        command = ["dd", f"bs={BLOCK_BYTES}", f"count={BLOCKS}", "conv=notrunc", *options]
        subprocess.run(command, check=True, capture_output=True)


def rates(sides: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """GB/s of every side, round by round, the order turning; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(ROUNDS + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.perf_counter()
            sides[name]()
            if number:
                found[name].append(BLOCKS * BLOCK_BYTES / (time.perf_counter() - started) / 1e9)
    return found


def report(what: str, found: dict[str, list[float]]) -> float:
    middle = {name: statistics.median(values) for name, values in found.items()}
    for name, values in found.items():
        print(f"{what:<6}{name:<22}{middle[name]:>7.2f} GB/s   ({min(values):.2f} to {max(values):.2f})")
    ratio = statistics.median(a / b for a, b in zip(found["slab"], found["bare O_DIRECT"], strict=True))
    print(f"{what:<6}slab / bare {ratio:.3f}, slab / dd {middle['slab'] / middle['dd']:.3f}")
    return ratio


def bandwidth(directory: Path) -> bool:
    rows, back = DramStore(BLOCKS, BLOCK_BYTES), DramStore(BLOCKS, BLOCK_BYTES)
    rows.rows[:] = np.random.default_rng(1).integers(0, 256, rows.rows.shape, dtype=np.uint8)
    back.rows[:] = 0
    ours, bare = Ours(directory, rows, back), Bare(directory / "bare", rows, back)
    print(f"{BLOCKS} blocks of {BLOCK_BYTES} bytes, queue depth {QUEUE_DEPTH} (dd: 1), median of {ROUNDS} rounds")
    print(f"direct I/O {'on' if ours.store.direct else 'OFF'}, {os.cpu_count()} CPUs")
    try:
        written = rates({"slab": ours.write, "bare O_DIRECT": bare.write, "dd": bare.dd_write})
        back.rows[:] = 0
        ours.read()
        assert bytes(back.rows) == bytes(rows.rows), "the slab returned other bytes"
        read = rates({"slab": ours.read, "bare O_DIRECT": bare.read, "dd": bare.dd_read})
        ratios = [report("write", written), report("read", read)]
    finally:
        ours.tier.close(time.monotonic() + 60)
        bare.lane.stop(time.monotonic() + 60)
        os.close(bare.fd)
    verdict = "reached" if min(ratios) >= TARGET else "MISSED"
    print(f"target {TARGET} of bare O_DIRECT: {verdict}")
    return min(ratios) >= TARGET


def recovery(directory: Path, slots: int) -> None:
    """The log is as long as it may get: everything written twice since the last checkpoint."""
    generation, path = b"g" * 16, directory / "index.log"
    with path.open("wb") as file:
        file.write(encode_log_header(generation))
        for sequence in range(1, 2 * slots + 1):
            key = BlockKey(sequence.to_bytes(32, "little"))
            file.write(encode_fact(generation, Fact(sequence, sequence * 7919 % slots, key)))
    size = path.stat().st_size
    gc.collect()
    started = time.perf_counter()
    log = IndexLog(path, generation, slots)
    seconds = time.perf_counter() - started
    assert len(log.recovered) == slots
    log.close()
    print(
        f"index of {slots} slots ({slots * slot_bytes(BLOCK_BYTES) / 1e9:.0f} GB of blocks), "
        f"log of {size / 1e6:.0f} MB: found again in {seconds:.2f} s"
    )


def main(arguments: list[str]) -> int:
    if len(arguments) > 1:
        print("slab takes one option: the directory to use", file=sys.stderr)
        return 2
    directory = Path(tempfile.mkdtemp(prefix="kvbm-bench-", dir=arguments[0] if arguments else None))
    try:
        if shutil.disk_usage(directory).free < 4 * BLOCKS * BLOCK_BYTES:
            print(f"{directory} has too little room")
            return 1
        assert mmap.PAGESIZE == 4096
        reached = bandwidth(directory)
        for slots in (50_000, 1_000_000):
            recovery(directory, slots)
    finally:
        shutil.rmtree(directory)
    return 0 if reached else 1
