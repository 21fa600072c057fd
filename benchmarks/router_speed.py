"""What a request costs: CPU time per request, requests per second and latency of our proxy and of other routers.

    python -m benchmarks router_speed [--peers FOLDER] [--compiled WHEEL] [--rounds N] [--seconds S] [--json FILE]

The proxy has core 0, engines and load generator (both in C, compiled at run time) have core 1. FOLDER holds virtual
environments named sglang-router, vllm-router, smg and dynamo; a peer that is not there is named and left out. Dynamo
has engines of its own, and one token to an answer of 200. WHEEL is our compiled wheel (`make wheel`). `splice` is the
floor of Python and uvloop. Every round runs every router once, so that other work on the machine hits all of them
alike; the table has medians over the rounds. CPU time per request, and per event of streams with 5 ms between two
events, is the steadiest column.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.routing import dynamo_stack, tools
from tools.server_process import free_port

ROUTERS = (
    "splice",
    "dynamo-proxy",
    "dynamo-proxy/compiled",
    "sglang-router:cache_aware",
    "vllm-router:cache_aware",
    "smg:cache_aware",
    "dynamo:kv",
)
# phase -> (body set, connections, requests per second; 0 is a closed loop)
PHASES = {"small": ("small", 64, 0), "8k": ("8k", 64, 0), "200rps": ("small", 32, 200), "stream": ("stream", 64, 0)}
EVENT_MICROSECONDS = 5000  # between two events of a stream: each is read and written alone


def free_ports(count: int) -> int:
    """The first of `count` neighbouring free ports."""
    while True:
        first = free_port()
        if first + count < 32768:
            return first


def start(name: str, port: int, folder: Path, options: argparse.Namespace) -> list[subprocess.Popen[bytes]]:
    """The engines and the router before them; nothing if it is not installed."""
    engine_port = free_ports(tools.ENGINES + 4)
    engines = [str(folder / "engine"), str(engine_port), str(tools.ENGINES), "0", str(EVENT_MICROSECONDS)]
    environment = dict(os.environ)
    if name.startswith("dynamo:"):
        stack = dynamo_stack.commands(options.peers, port, tools.ENGINES, folder)
        engines, router = stack or ([], None)
        environment = dynamo_stack.environment(folder)
    else:
        ports = range(engine_port, engine_port + tools.ENGINES)
        router = tools.router_command(name.removesuffix("/compiled"), port, ports, options.peers)
    if name.endswith("/compiled"):
        environment["PYTHONPATH"] = str(folder / "compiled")
        router = router if options.compiled is not None else None
    if router is None:
        return []
    quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    pinned = ((1, engines), (0, router))
    return [subprocess.Popen(tools.pinned(core, command), env=environment, **quiet) for core, command in pinned]


def run_router(name: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All phases on one router: a row each."""
    port = free_ports(4)
    processes = start(name, port, folder, options)
    if not processes:
        return []
    rows = []
    router = processes[1]
    try:
        if not tools.wait_ready(port, router):
            print(f"  {name}: not ready within a minute", file=sys.stderr)
            return []
        for phase, (bodies, connections, rate) in PHASES.items():
            set_of_bodies = folder / (f"{bodies}-one-token" if name.startswith("dynamo:") else bodies)
            load = [str(folder / "load"), str(port), str(set_of_bodies), str(connections)]
            before, began = tools.cpu_seconds(tools.process_tree(router.pid)), time.monotonic()
            answer = subprocess.run(
                tools.pinned(1, [*load, str(options.seconds), "0.5", str(rate)]), capture_output=True, check=True
            )
            pids = tools.process_tree(router.pid)
            busy = (tools.cpu_seconds(pids) - before) / (time.monotonic() - began)  # of a second
            row = {"router": name, "phase": phase, **json.loads(answer.stdout)}
            row["cpu_us"] = busy / max(row["rps"], 1e-9) * 1e6
            row["cpu_event_us"] = busy / row["events_per_s"] * 1e6 if row["events_per_s"] else 0.0
            row["rss_mb"] = tools.resident_mb(pids)
            rows.append(row)
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| router | phase | CPU us/request | CPU us/event | requests/s | p50 us | p99 us | RSS MB | failed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ROUTERS:
        for phase in PHASES:
            found = [row for row in rows if (row["router"], row["phase"]) == (name, phase)]
            if found:
                middle = {
                    key: statistics.median(row[key] for row in found)
                    for key in ("cpu_us", "cpu_event_us", "rps", "p50_us", "p99_us", "rss_mb")
                }
                failed = sum(row["failed"] + row["lost"] for row in found)
                lines.append(
                    f"| {name} | {phase} | {middle['cpu_us']:.1f} | {middle['cpu_event_us']:.1f} "
                    f"| {middle['rps']:.0f} | {middle['p50_us']:.0f} "
                    f"| {middle['p99_us']:.0f} | {middle['rss_mb']:.0f} | {failed} |"
                )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks router_speed")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--compiled", type=Path, metavar="WHEEL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--routers", default=",".join(ROUTERS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            tools.build(folder)
        except tools.MissingToolError as error:
            print(f"router_speed: {error}", file=sys.stderr)
            return 2
        if options.compiled is not None:
            with zipfile.ZipFile(options.compiled) as wheel:
                wheel.extractall(folder / "compiled")
        sizes = {"small": (2, 60, 0), "8k": (5, 1400, 0), "stream": (2, 60, 64)}
        for name, (turns, turn_bytes, events) in sizes.items():
            mean = tools.write_bodies(folder / name, turns, turn_bytes, events or 200, stream=bool(events))
            tools.write_bodies(folder / f"{name}-one-token", turns, turn_bytes, events or 1, stream=bool(events))
            print(f"  bodies {name}: {mean} bytes on average")
        for _ in range(options.rounds):
            for router in options.routers.split(","):
                found = run_router(router, folder, options)
                if not found:
                    print(f"  {router}: not measured")
                rows += found
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0
