"""A trace replayed over real HTTP: our proxy and other routers before the same simulated engines, one after the other.

    python -m benchmarks router_replay --trace mooncake_conversation_trace.jsonl [--peers FOLDER] [--requests N]

Eight engines (500k tokens of KV each) whose virtual time runs `--speed` times as fast as the clock. Arrivals come when
the trace says, answered or not. Times are virtual seconds. FOLDER as for router_speed; its `dynamo` is a Python with
ai-dynamo, whose frontend gets the same engines as workers of its own runtime, with KV events. The first row is repeated
as the last, to show what other work on the machine and chance do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from benchmarks.router_speed import free_ports
from benchmarks.routing import tools
from benchmarks.routing.http_engines import text_of
from benchmarks.routing.traces import Arrival, read_mooncake

ROUTERS = (
    "dynamo-proxy", "sglang-router:cache_aware", "smg:cache_aware", "vllm-router:cache_aware", "dynamo:kv",
    "dynamo-proxy:round-robin", "dynamo-proxy",
)  # fmt: skip
CAPACITY_TOKENS = 500_000


@dataclass
class Seen:
    """What clients saw, in seconds of the clock."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    failed: int = 0


async def one(session: aiohttp.ClientSession, url: str, arrival: Arrival, due: float, seen: Seen) -> None:
    body = json.dumps({
        "model": "m", "prompt": text_of(arrival.blocks, arrival.prompt_tokens), "stream": True, "temperature": 0,
        "max_tokens": arrival.output_tokens,
    }).encode()  # fmt: skip
    await asyncio.sleep(due - time.perf_counter())
    began, first = time.perf_counter(), 0.0
    try:
        async with session.post(url, data=body, headers={"content-type": "application/json"}) as answer:
            async for _ in answer.content.iter_any():
                first = first or time.perf_counter()
            if answer.status != 200:
                seen.failed += 1
                return
    except aiohttp.ClientError:
        seen.failed += 1
        return
    seen.first.append(first - began)
    if arrival.output_tokens > 1:
        seen.between.append((time.perf_counter() - first) / (arrival.output_tokens - 1))


async def replay(url: str, arrivals: list[Arrival], speed: float) -> Seen:
    seen, tasks = Seen(), set()
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        start = time.perf_counter() + 0.5
        for arrival in arrivals:
            due = start + arrival.seconds / speed
            await asyncio.sleep(max(0.0, due - time.perf_counter() - 1.0))  # the bodies of all would take a gigabyte
            tasks.add(asyncio.create_task(one(session, url, arrival, due, seen)))
        await asyncio.gather(*tasks)
    return seen


def run_router(name: str, arrivals: list[Arrival], options: argparse.Namespace) -> dict[str, Any] | None:
    engine_port, port = free_ports(tools.ENGINES + 4), free_ports(4)
    command = tools.router_command(name, port, range(engine_port, engine_port + tools.ENGINES), options.peers)
    if command is None:
        return None
    numbers = list(map(str, (engine_port, tools.ENGINES, options.speed, CAPACITY_TOKENS)))
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    folder = tempfile.TemporaryDirectory()
    start = [sys.executable, "-m", "benchmarks.routing.http_engines", *numbers]
    if name.startswith("dynamo:"):
        quiet["env"] = {**os.environ, "DYN_FILE_KV": f"{folder.name}/kv", "DYN_LOG": "error", "PYTHONPATH": os.getcwd()}
        start = [command[0], "-m", "benchmarks.routing.dynamo_workers", *numbers, f"{folder.name}/model"]
    engines, router = subprocess.Popen(start, **quiet), subprocess.Popen(command, **quiet)
    try:
        if not tools.wait_ready(port, router):
            return None
        seen = uvloop.run(replay(f"http://127.0.0.1:{port}/v1/completions", arrivals, options.speed))
        stats: Any = tools.get_json(f"http://127.0.0.1:{engine_port}/stats")
    finally:
        for process in (router, engines):
            process.kill()
            process.wait()
        folder.cleanup()
    first = sorted(seconds * options.speed for seconds in seen.first)
    requests = [row[2] for row in stats]
    return {
        "router": name, "requests": len(first), "failed": seen.failed,
        "hit": sum(row[1] for row in stats) / max(1, sum(row[0] for row in stats)),
        "ttft_mean": statistics.fmean(first),
        **{f"ttft_p{p}": first[min(len(first) - 1, len(first) * p // 100)] for p in (50, 90, 99)},
        "tpot_ms": statistics.fmean(seen.between) * options.speed * 1000,
        "largest_share": max(requests) * len(requests) / sum(requests),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| router | hit | TTFT mean s | p50 | p90 | p99 | TPOT ms | max:mean requests | failed |",
        "|---" * 9 + "|",
    ]
    lines += [
        "| {router} | {hit:.3f} | {ttft_mean:.3f} | {ttft_p50:.2f} | {ttft_p90:.2f} | {ttft_p99:.1f} | {tpot_ms:.1f} "
        "| {largest_share:.2f} | {failed} |".format(**row)
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks router_replay")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--requests", type=int, default=3400)
    parser.add_argument("--speed", type=float, default=5.0)
    parser.add_argument("--load", type=float, default=1.0)
    parser.add_argument("--routers", default=",".join(ROUTERS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.trace is None:
        print("no trace: nothing measured (--trace names one)")
        return 0
    arrivals = read_mooncake(options.trace, options.requests, options.load)
    rows: list[dict[str, Any]] = []
    for router in options.routers.split(","):
        row = run_router(router, arrivals, options)
        if row is None:
            print(f"  {router}: not installed, or not ready within a minute", file=sys.stderr)
            continue
        rows.append(row)
        print(json.dumps(row), flush=True)
    print(table(rows))
    if options.json:
        options.json.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return 0
