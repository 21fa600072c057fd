"""Hand-offs between engines of unequal tensor parallelism beside those of equal: two processes, host memory.

Blocks of Llama-3.1-8B's size: 2 MiB on one rank, 1 MiB on each of two. Each kind of reader gets the same bytes from
ranks like its own, and from the others, by turns; they are compared. Options: UCX transports (`tcp`; default: UCX
chooses, which is a copy between the processes on one host).
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.peer_loads import load
from dynamo_connectors.below import PEER_READ_ROWS, PEER_READS
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.head_map import HeadPage, Heads
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.transport.agent import Region
from dynamo_connectors.transport.divided_peers import DividedPeerTier
from dynamo_connectors.transport.peer_tier import PeerSettings
from dynamo_connectors.transport.server import PeerServer, ServerSettings
from dynamo_connectors.transport.tickets import Ticket
from tools.server_process import free_port

LAYERS, HEADS, TOKENS, WIDTH = 32, 8, 16, 128
BLOCKS = 64
ROUNDS = 15
RANKS = (1, 2)
#: How often a page has all its heads.
TIMES = {1: "keys and values of a head side by side (vLLM 0.32)", 2: "all keys before all values (vLLM 0.24)"}
LEASE = b"l" * 16


def heads_of(ranks: int, times: int) -> Heads:
    """Of a rank. `times`: keys and values of a head side by side, or all keys before all values."""
    head_bytes = 2 * TOKENS * WIDTH * 2 // times
    page = times * (HEADS // ranks) * head_bytes
    return Heads(tuple(HeadPage(layer * page, times, HEADS // ranks, head_bytes) for layer in range(LAYERS)), "")


def row_of(block: int, rank: int, ranks: int, times: int) -> npt.NDArray[np.uint8]:
    page = heads_of(1, times).pages[0]
    model = np.random.default_rng(block).integers(0, 256, (LAYERS, times, HEADS, page.head_bytes), dtype=np.uint8)
    return np.ascontiguousarray(np.split(model, ranks, axis=2)[rank]).ravel()


def own(pipe: Connection, ports: dict[int, int], times: int) -> None:
    """The prefill engines' process: all their ranks under one long lease."""
    servers = []
    for ranks, port in ports.items():
        for rank in range(ranks):
            dram = DramStore(BLOCKS, row_of(0, rank, ranks, times).nbytes)
            for block in range(BLOCKS):
                dram.write(block, BlockKey(b"%d" % block), memoryview(row_of(block, rank, ranks, times)))
            servers.append(PeerServer(ServerSettings("127.0.0.1", port + rank, b"n", b"s", 600.0), dram))
            servers[-1].export(LEASE, {BlockKey(b"%d" % block): block for block in range(BLOCKS)})
    pipe.send("ready")
    pipe.recv()
    for server in servers:
        server.close()


class Reader:
    """The first rank of a decode engine of so many."""

    def __init__(self, ranks: int, times: int) -> None:
        self.ranks, self._times = ranks, times
        self.dram = DramStore(BLOCKS, row_of(0, 0, ranks, times).nbytes)
        self.dram.rows[:] = 0
        region = Region(self.dram.rows.ctypes.data, self.dram.rows.nbytes)
        settings = PeerSettings(0, b"n", self.dram.row_bytes, b"s", 60.0, workers=ranks)
        self.tier = DividedPeerTier(settings, [region], partial(self._divided, settings))

    def _divided(self, settings: PeerSettings, among: int) -> Sequence[PeerSettings]:
        parts = heads_of(self.ranks, self._times).parts(0, self.ranks, among)
        return [replace(settings, rank=part.rank, row_bytes=part.row_bytes, parts=part.pieces) for part in parts]

    def read(self, port: int, among: int) -> float:
        parts = (range(first, min(first + PEER_READ_ROWS, BLOCKS)) for first in range(0, BLOCKS, PEER_READ_ROWS))
        return load(self.tier, Ticket("127.0.0.1", port, LEASE, among), self.dram, parts, PEER_READS)

    def check(self) -> None:
        for block in range(BLOCKS):
            assert (self.dram.rows[block] == row_of(block, 0, self.ranks, self._times)).all(), "wrong bytes"
        self.dram.rows[:] = 0


def compare(reader: Reader, ports: dict[int, int]) -> None:
    times: dict[int, list[float]] = {among: [] for among in ports}
    for turn in range(ROUNDS + 1):
        for among in sorted(ports, reverse=bool(turn % 2)):
            seconds = reader.read(ports[among], among)
            if turn:
                times[among].append(seconds)
            else:  # the first one connects
                reader.check()
    gb_s = {among: reader.dram.rows.nbytes / statistics.median(of) / 1e9 for among, of in times.items()}
    (other,) = set(ports) - {reader.ranks}
    pieces = len(heads_of(reader.ranks, reader._times).parts(0, reader.ranks, other)[0].pieces)
    print(
        f"one of {reader.ranks}: from {reader.ranks} {gb_s[reader.ranks]:5.2f} GB/s, from {other} {gb_s[other]:5.2f}, "
        f"in {pieces} pieces a block and rank; ratio {gb_s[other] / gb_s[reader.ranks]:.2f}",
        flush=True,
    )


def main(arguments: list[str]) -> int:
    os.environ["NIXL_LOG_LEVEL"] = "ERROR"
    if arguments:
        os.environ["UCX_TLS"] = arguments[0]
    print(f"UCX_TLS={os.environ.get('UCX_TLS', '(UCX chooses)')}, {ROUNDS} rounds, medians")
    context: Any = multiprocessing.get_context("spawn")
    for times, what in TIMES.items():
        print(what)
        ports = {ranks: free_port(ranks) for ranks in RANKS}
        here, there = context.Pipe()
        owner = context.Process(target=own, args=(there, ports, times))
        owner.start()
        here.recv()
        for ranks in RANKS:
            reader = Reader(ranks, times)
            compare(reader, ports)
            assert reader.tier.close(time.monotonic() + 10)
        here.send("end")
        owner.join()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
