"""Blocks of a peer, read with leases and fences, beside bare NIXL READs of the same blocks: two processes, host memory.

The sides take turns on the same memory of the same owner. Options: UCX transports (`tcp`; default: UCX chooses, which
is a copy between the processes on one host).
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.peer_loads import load
from dynamo_connectors.below import PEER_READ_ROWS, PEER_READS
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.transport.agent import Agent, Region
from dynamo_connectors.transport.peer_tier import PeerSettings, PeerTier
from dynamo_connectors.transport.server import PeerServer, ServerSettings
from dynamo_connectors.transport.tickets import Ticket
from tools.server_process import free_port

TOTAL_BYTES = 128 << 20
ROUNDS = 15
LEASE = b"l" * 16
TARGET = 0.9


def own(pipe: Connection, row_bytes: int, port: int) -> None:
    """The owner's process: a slab of blocks under one long lease."""
    dram = DramStore(TOTAL_BYTES // row_bytes, row_bytes)
    keys = [BlockKey(b"%d" % slot) for slot in range(dram.capacity_blocks)]
    for slot, key in enumerate(keys):
        dram.write(slot, key, memoryview(os.urandom(64) * (row_bytes // 64)))
    server = PeerServer(ServerSettings("127.0.0.1", port, b"n", b"s", 600.0), dram)
    server.export(LEASE, {key: slot for slot, key in enumerate(keys)})
    offer = server._owner._offer
    pipe.send((offer.metadata, offer.base))
    pipe.recv()
    server.close()


class Sides:
    """Both ways of reading, into the same rows."""

    def __init__(self, row_bytes: int, port: int, metadata: bytes, base: int) -> None:
        self.row_bytes, self._base = row_bytes, base
        self.reads_at_once = PEER_READS
        self.dram = DramStore(TOTAL_BYTES // row_bytes, row_bytes)
        self.dram.rows[:] = 0  # pages are there before anything is timed
        region = Region(self.dram.rows.ctypes.data, self.dram.rows.nbytes)
        self.agent = Agent("bare", [region])
        self._peer = self.agent.connect(metadata)
        self.tier = PeerTier(PeerSettings(0, b"n", row_bytes, b"s", 60.0), [region])
        self._ticket = Ticket("127.0.0.1", port, LEASE)

    def bare(self, batches: list[range]) -> float:
        return sum(self._bare(batch) for batch in batches)

    def _bare(self, rows: range) -> float:
        local = [self.dram.rows.ctypes.data + row * self.row_bytes for row in rows]
        remote = [self._base + row * self.row_bytes for row in rows]
        started = time.perf_counter()
        handle = self.agent.post(self._peer, local, remote, self.row_bytes)
        while not self.agent.is_done(handle):
            pass
        seconds = time.perf_counter() - started
        self.agent.release(handle)
        return seconds

    def ours(self, batches: list[range]) -> float:
        return load(self.tier, self._ticket, self.dram, batches, self.reads_at_once)


def compare(what: str, sides: Sides, batches: list[range]) -> tuple[float, float]:
    """Medians of both sides' seconds for all batches, one after the other."""
    times: dict[str, list[float]] = {"bare": [], "ours": []}
    for turn in range(ROUNDS + 1):
        for name in ("bare", "ours") if turn % 2 else ("ours", "bare"):
            seconds = getattr(sides, name)(batches)
            if turn:  # the first one connects
                times[name].append(seconds)
    bare, ours = statistics.median(times["bare"]), statistics.median(times["ours"])
    num_bytes = sum(len(batch) for batch in batches) * sides.row_bytes
    print(
        f"{what:38} bare {num_bytes / bare / 1e9:6.2f} GB/s  ours {num_bytes / ours / 1e9:6.2f} GB/s  "
        f"ratio {bare / ours:5.2f}  added per READ {(ours - bare) / len(batches) * 1e6:6.0f} us",
        flush=True,
    )
    return bare, ours


def main(arguments: list[str]) -> int:
    os.environ["NIXL_LOG_LEVEL"] = "ERROR"
    if arguments:
        os.environ["UCX_TLS"] = arguments[0]
    print(f"UCX_TLS={os.environ.get('UCX_TLS', '(UCX chooses)')}, {ROUNDS} rounds, medians")
    met = True
    context: Any = multiprocessing.get_context("spawn")
    for row_bytes in (64 << 10, 1 << 20, 2 << 20):
        here, there = context.Pipe()
        port = free_port()
        owner = context.Process(target=own, args=(there, row_bytes, port))
        owner.start()
        sides = Sides(row_bytes, port, *here.recv())
        rows = TOTAL_BYTES // row_bytes
        name = f"{row_bytes >> 10} KiB blocks"
        compare(f"{name}, one", sides, [range(1)])
        for size in (PEER_READ_ROWS // 2, PEER_READ_ROWS, 2 * PEER_READ_ROWS):
            parts = [range(at, min(at + size, rows)) for at in range(0, rows, size)]
            for sides.reads_at_once in (PEER_READS, 2 * PEER_READS):
                compare(f"{name}, {size} a READ, {sides.reads_at_once} at once", sides, parts)
        bare, ours = compare(f"{name}, all {rows} in one READ", sides, [range(rows)])
        met &= row_bytes < 1 << 20 or bare / ours >= TARGET
        assert sides.tier.close(time.monotonic() + 10)
        here.send("end")
        owner.join()
    print(f"goal: {TARGET} of bare NIXL at 1 and 2 MiB blocks: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
