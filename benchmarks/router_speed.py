"""What a request costs: CPU time per request, requests per second and latency of our proxy and of other routers.

    python -m benchmarks router_speed [--peers FOLDER] [--rounds N] [--seconds S] [--json FILE]

The proxy has core 0, engines and load generator (both in C, compiled at run time) have core 1. FOLDER holds virtual
environments named sglang-router, vllm-router and smg; a peer that is not there is named and left out. `splice` is the
floor of Python and uvloop. Every round runs every router once, so that other work on the machine hits all of them
alike; the table has medians over the rounds. CPU time per request is the steadiest column.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.routing import tools
from tools.server_process import free_port

ROUTERS = (
    "splice",
    "dynamo-proxy",
    "dynamo-proxy:round-robin",
    "sglang-router:cache_aware",
    "vllm-router:cache_aware",
    "smg:cache_aware",
)
# phase -> (body set, connections, requests per second; 0 is a closed loop)
PHASES = {"small": ("small", 64, 0), "8k": ("8k", 64, 0), "200rps": ("small", 32, 200), "stream": ("stream", 32, 0)}


def free_ports(count: int) -> int:
    """The first of `count` neighbouring free ports."""
    while True:
        first = free_port()
        if first + count < 32768:
            return first


def run_router(name: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All phases on one router: a row each."""
    engine_port, port = free_ports(tools.ENGINES + 4), free_ports(4)
    ports = range(engine_port, engine_port + tools.ENGINES)
    command = tools.router_command(name, port, ports, options.peers)
    if command is None:
        return []
    rows = []
    engine = subprocess.Popen(tools.pinned(1, [str(folder / "engine"), str(engine_port), str(tools.ENGINES)]))
    router = subprocess.Popen(
        tools.pinned(0, command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        if not tools.wait_ready(port, router):
            print(f"  {name}: not ready within a minute", file=sys.stderr)
            return []
        for phase, (bodies, connections, rate) in PHASES.items():
            pids = tools.process_tree(router.pid)
            before, cpu = sum(tools.get_json(f"http://127.0.0.1:{engine_port}/stats")), tools.cpu_seconds(pids)
            load = [str(folder / "load"), str(port), str(folder / bodies), str(connections)]
            answer = subprocess.run(
                tools.pinned(1, [*load, str(options.seconds), "0.5", str(rate)]), capture_output=True, check=True
            )
            pids = tools.process_tree(router.pid)
            requests = sum(tools.get_json(f"http://127.0.0.1:{engine_port}/stats")) - before
            row = {"router": name, "phase": phase, **json.loads(answer.stdout)}
            row["cpu_us"] = (tools.cpu_seconds(pids) - cpu) / max(1, requests) * 1e6
            row["rss_mb"] = tools.resident_mb(pids)
            rows.append(row)
    finally:
        for process in (router, engine):
            process.kill()
            process.wait()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| router | phase | CPU us/request | requests/s | p50 us | p99 us | RSS MB | failed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ROUTERS:
        for phase in PHASES:
            found = [row for row in rows if (row["router"], row["phase"]) == (name, phase)]
            if found:
                middle = {
                    key: statistics.median(row[key] for row in found)
                    for key in ("cpu_us", "rps", "p50_us", "p99_us", "rss_mb")
                }
                failed = sum(row["failed"] + row["lost"] for row in found)
                lines.append(
                    f"| {name} | {phase} | {middle['cpu_us']:.1f} | {middle['rps']:.0f} | {middle['p50_us']:.0f} "
                    f"| {middle['p99_us']:.0f} | {middle['rss_mb']:.0f} | {failed} |"
                )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks router_speed")
    parser.add_argument("--peers", type=Path)
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
        sizes = {"small": (2, 60, False), "8k": (5, 1400, False), "stream": (2, 60, True)}
        for name, (turns, turn_bytes, stream) in sizes.items():
            mean = tools.write_bodies(folder / name, turns, turn_bytes, stream)
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
