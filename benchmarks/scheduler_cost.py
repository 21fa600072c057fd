"""CPU time of the scheduler half over the life of one long prompt that hits: what a request waits for in Python.

python -m benchmarks scheduler_cost [--blocks 2048] [--against CHECKOUT]
`--against` runs this file on another checkout too, in turns, and prints the ratios. The floor is a plain dict asked for
the same keys once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK_TOKENS = 16
ROUNDS, TURNS = 9, 3


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scheduler_cost", description=__doc__)
    parser.add_argument("--blocks", type=int, default=2048)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--once", action="store_true", help="measure here, and print JSON")
    options = parser.parse_args(arguments)
    if options.once:
        print(json.dumps(measure(options.blocks)))
        return 0
    checkouts = [ROOT, *([options.against.resolve()] if options.against else [])]
    runs: dict[Path, list[dict[str, float]]] = {checkout: [] for checkout in checkouts}
    for turn in range(TURNS):
        for checkout in checkouts[:: -1 if turn % 2 else 1]:
            runs[checkout].append(measured_in(checkout, options.blocks))
    print(table(options.blocks, [medians(runs[checkout]) for checkout in checkouts]))
    return 0


def measured_in(checkout: Path, blocks: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--once", "--blocks", str(blocks)]
    # Where the packages are installed elsewhere, as a wheel, that is what is measured.
    sources = [str(checkout), str(checkout / "kernels")] if (checkout / "dynamo_connectors").is_dir() else []
    path = [*sources, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    done = subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {what: statistics.median(run[what] for run in runs) for what in runs[0]}


def table(blocks: int, columns: Sequence[dict[str, float]]) -> str:
    lines = [f"CPU ms for a prompt of {blocks} blocks; medians of {TURNS} processes, {ROUNDS} rounds each"]
    for what, here in columns[0].items():
        there = "".join(f"  against {column[what] * 1e3:7.3f}, {column[what] / here:5.2f} x" for column in columns[1:])
        lines.append(f"  {what:<28}{here * 1e3:8.3f}{there}")
    return "\n".join(lines)


def measure(blocks: int) -> dict[str, float]:
    """Seconds of this process by step, medians. Thread time: others on the machine do not count."""
    times: dict[str, list[float]] = {}

    def timed(what: str, call: Callable[[], Any]) -> Any:
        started = time.thread_time()
        result = call()
        times.setdefault(what, []).append(time.thread_time() - started)
        return result

    for number in range(ROUNDS + 1):
        if number == 1:
            times.clear()  # the first round warms up
        _Life(blocks, number, timed).run()
    found = {what: statistics.median(seconds) for what, seconds in times.items()}
    hit = ("match", "lease", "release", "offer what was loaded")
    return {**found, "before the first token, of a hit": sum(found[what] for what in hit)}


class _Life:
    """One prompt that is computed, kept, lost to HBM, asked for again and loaded."""

    def __init__(self, blocks: int, seed: int, timed: Callable[[str, Callable[[], Any]], Any]) -> None:
        from dynamo_connectors.block_manager import BlockManager, NamedTier
        from dynamo_connectors.load_gate import LoadGate
        from dynamo_connectors.tiers.index import TierIndex
        from dynamo_connectors.vllm.groups import Geometry, Group
        from dynamo_connectors.vllm.kv_events import TierEvents
        from dynamo_connectors.vllm.live import Limits
        from dynamo_connectors.vllm.scheduler import SchedulerHalf

        rng = random.Random(seed)
        self.hashes = [rng.randbytes(32) for _ in range(blocks)]
        self.timed = timed
        geometry = Geometry((Group(BLOCK_TOKENS),), BLOCK_TOKENS)
        manager = BlockManager(
            [NamedTier("host_dram", TierIndex(2 * blocks)), NamedTier("nvme_ssd", TierIndex(2 * blocks))],
            {"nvme_ssd": 2},
        )
        limits = Limits(geometry, 1.0, 1, 4 * blocks, 2 << 20, lasting_tiers=())
        self.half = SchedulerHalf(manager, limits, TierEvents(geometry, False), LoadGate(), time.monotonic)
        self.half.bind_holds(_Holds(), _Holds())
        self.tables = [list(range(1, blocks + 1))]

    def run(self) -> None:
        half, tokens = self.half, len(self.hashes) * BLOCK_TOKENS
        cold, warm = _Request("cold", self.hashes), _Request("warm", self.hashes)
        half.new_request(cold)
        self.timed("match nothing", lambda: half.matched_tokens(cold, 0))
        half.after_alloc(cold, self.tables, 0)
        self.timed("offer a cold prompt", lambda: half.offer("cold", tokens, 0, lambda: self.tables))
        self._end("end of its stores")
        self.timed("finish", lambda: half.finished(cold, self.tables, tokens))
        self._end(None)
        half.new_request(warm)
        found = self.timed("match", lambda: half.matched_tokens(warm, 0))
        assert found == tokens, f"{found} of {tokens} tokens hit"
        self.timed("lease", lambda: half.after_alloc(warm, self.tables, found))
        self._end("release")
        self.timed("offer what was loaded", lambda: half.offer("warm", tokens, 0, lambda: self.tables))
        self.timed("finish a hit", lambda: half.finished(warm, self.tables, tokens))

    def _end(self, what: str | None) -> None:
        """A worker does all it is told; the first reports are those that count."""
        from dynamo_connectors.vllm.messages import WorkerReports

        while self.half.has_work:
            plan = self.half.plan(is_idle=False)
            jobs = [*plan.stores, *plan.loads, *plan.moves, *plan.erasures]
            reports = WorkerReports({job.job_id: 1 for job in jobs})
            if what is None:
                self.half.worker_reports(reports)
            else:
                self.timed(what, lambda: self.half.worker_reports(reports))  # noqa: B023 - called at once
                what = None


class _Request:
    lora_request = None
    kv_transfer_params = None
    max_tokens = 16

    def __init__(self, request_id: str, hashes: list[bytes]) -> None:
        self.request_id, self.block_hashes = request_id, hashes
        self.num_tokens = self.num_prompt_tokens = len(hashes) * BLOCK_TOKENS


class _Holds:
    held_blocks = 0

    def hold(self, block_ids: Sequence[int]) -> None:
        self.held_blocks += len(block_ids)

    def release(self, block_ids: Sequence[int]) -> None:
        self.held_blocks -= len(block_ids)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
