"""The planner and Dynamo's own modes in Dynamo's own simulator, on the same streams.

    PYTHON_WITH_AI_DYNAMO -m benchmarks.replay --traces FOLDER [--shapes burst,m-large] [--policies planner,oracle,...]

Needs ai-dynamo 1.4.2 in an environment of its own (`pip install ai-dynamo==1.4.2 pmdarima
filterpy prophet plotly prometheus-api-client`: it names none of the last five), run from the repository's root. The
judge is its offline replay: vLLM scheduler model, step times measured on an H200 (Llama-3.1-8B FP8), round-robin
routing, start-up 90 s, starting with 3 prefill and 3 decode workers unless told. Goodput counts requests within both
targets.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "planner_sidecar"))
os.environ.setdefault("DYN_LOG", "error")

from benchmarks.replay.judge import judged  # noqa: E402
from benchmarks.replay.shapes import SHAPES, Stream, write_trace  # noqa: E402

DEFAULT = (
    "planner,oracle,throughput,latency,load,sla-constant,sla-arima,sla-kalman,sla-prophet,"
    "sla_load,sla_both-constant,sla_both-arima,sla_both-kalman,sla_both-prophet"
)


BORROWERS = ("oracle", "hindsight")
POLICIES = (
    "also static-P-D, and hindsight-ROOM: knows the true rates up to now and keeps ROOM times what they need; "
    "it and the oracle need the planner before them"
)


def workers(text: str) -> tuple[int, int]:
    """P-D."""
    prefill, decode = map(int, text.split("-"))
    return prefill, decode


def line_of(name: str, seen: dict[str, Any], count: int) -> str:
    if "failed" in seen:
        return f"{name:18} {seen['failed']}"
    return (
        f"{name:18} goodput {seen['goodput_completed_requests'] / count:6.1%}  GPU-h {seen['gpu_hours']:6.2f}  "
        f"TTFT p50/p99 {seen['median_ttft_ms']:.0f}/{seen['p99_ttft_ms']:.0f} ms  "
        f"TPOT p99 {seen['p99_tpot_ms']:.1f} ms  [{seen['seconds']} s]"
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.replay", description=__doc__)
    parser.add_argument("--traces", type=Path, required=True, help="folder with servegen_* and azure2023_conv.csv")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--policies", default=DEFAULT, help=POLICIES)
    parser.add_argument("--attainment", type=float, default=0.98)
    parser.add_argument("--hours", type=float, default=1.25, help="length of each stream")
    parser.add_argument("--mean-rps", type=float, default=14.0, help="mean rate of each stream")
    parser.add_argument("--start", type=workers, default=(3, 3), metavar="P-D", help="workers at the beginning")
    parser.add_argument("--burst-factor", type=float, default=1.0, help="of the planner: see its README")
    parser.add_argument("--window-seconds", type=float, default=100.0, help="of the planner: its window")
    parser.add_argument("--limit-seconds", type=float, default=600.0, help="for one run")
    parser.add_argument("--log", type=Path, help="write the planner's decisions here")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        import dynamo.replay  # noqa: F401
    except ImportError:
        print(
            "benchmarks.replay: ai-dynamo 1.4.2 is not in this environment; see the head of the file", file=sys.stderr
        )
        return 2
    names = options.policies.split(",")
    groups = [[name] for name in names if not name.startswith(BORROWERS)]
    borrowers = [name for name in names if name.startswith(BORROWERS)]
    if borrowers:
        next(group for group in groups if group == ["planner"]).extend(borrowers)
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes.split(","):
            trace = Path(folder, f"{shape}.jsonl")
            stream = Stream(shape, options.hours, options.mean_rps, options.seed)
            count = write_trace(trace, stream, options.traces)
            print(f"== {shape}: {count} requests in {options.hours:g} h, seed {options.seed}", flush=True)
            for group in groups:
                for name, seen in zip(group, judged(trace, group, options), strict=True):
                    print(line_of(name, seen, count), flush=True)
                    if options.log is not None and "log" in seen:
                        with options.log.open("a") as file:
                            file.writelines(f"{shape} {' '.join(map(str, entry))}\n" for entry in seen["log"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
