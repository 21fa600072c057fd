"""What `import PACKAGE` adds to a fresh interpreter, over a bare one: the budget is 0.3 s."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("", "kernels", "routing_proxy", "planner_sidecar", "entrypoints")
STATEMENTS = (
    "import dynamo_connectors",
    "import dynamo_kernels",
    "import dynamo_proxy",
    "import dynamo_planner",
    "import dynamo_entrypoints",
    "import numpy",  # a peer that everybody knows
)
BUDGET_SECONDS = 0.3
RUNS = 7


def seconds(statement: str, environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], env=environment, check=True)
    return time.perf_counter() - started


def main(arguments: list[str]) -> int:
    """Prints one row per package; returns 1 when a package of ours is over the budget."""
    if arguments:
        print("import_time takes no options", file=sys.stderr)
        return 2
    path = os.pathsep.join(str(ROOT / folder) for folder in FOLDERS)
    environment = {**os.environ, "PYTHONPATH": path}
    samples: dict[str, list[float]] = {statement: [] for statement in ("pass", *STATEMENTS)}
    for number in range(RUNS + 1):  # round-robin: a noisy neighbour hits every row alike
        for statement, times in samples.items():
            taken = seconds(statement, environment)
            if number:  # the first round fills the page cache and writes the bytecode
                times.append(taken)
    floor = statistics.median(samples["pass"])
    print(f"median of {RUNS} fresh interpreters ({sys.version.split()[0]}); floor: python -c pass")
    print(f"{'statement':<28}{'total s':>9}{'over floor s':>14}")
    print(f"{'pass':<28}{floor:>9.3f}{0.0:>14.3f}")
    worst = 0.0
    for statement in STATEMENTS:
        total = statistics.median(samples[statement])
        print(f"{statement:<28}{total:>9.3f}{total - floor:>14.3f}")
        if "dynamo_" in statement:
            worst = max(worst, total - floor)
    verdict = "within" if worst <= BUDGET_SECONDS else "OVER"
    print(f"slowest of ours: {worst:.3f} s over the floor, {verdict} the budget of {BUDGET_SECONDS} s")
    return 0 if worst <= BUDGET_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
