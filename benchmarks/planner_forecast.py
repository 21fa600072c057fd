"""Cover of the planner's 95 % bound on series of request rates, against what covering with the last value costs.

    python -m benchmarks planner_forecast [--traces FOLDER]

FOLDER holds public traces: servegen_*_10min.csv (t_s, rate_rps), azure2023_*.csv (TIMESTAMP, ...) and *_trace.jsonl
(timestamp in ms). Without it three synthetic series show that it runs, and nothing is judged. The peer is the same
conformal bound around the last value. Cover outside 93..97 % on any trace is exit code 1.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import sys
from datetime import datetime
from pathlib import Path

from dynamo_planner.forecast import ForecastRule, ForecastState, fold, outlook

LOW, HIGH = 0.93, 0.97


def by_steps(times: list[float], step: float) -> list[float]:
    """Requests per second in each step."""
    first = min(times)
    counts = [0] * (int((max(times) - first) // step) + 1)
    for time in times:
        counts[int((time - first) // step)] += 1
    return [count / step for count in counts[:-1]]  # the last step is not full


def series(folder: Path) -> list[tuple[str, float, list[float]]]:
    """(name, seconds per step, requests/s) of every trace in the folder."""
    found = []
    for path in sorted(folder.glob("servegen_*_10min.csv")):
        with path.open() as lines:
            found.append((path.stem, 600.0, [float(row["rate_rps"]) for row in csv.DictReader(lines)]))
    for path in sorted(folder.glob("azure2023_*.csv")):
        with path.open() as lines:
            stamps = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in csv.DictReader(lines)]
        found.append((path.stem, 10.0, by_steps(stamps, 10.0)))
    for path in sorted(folder.glob("*_trace.jsonl")):
        with path.open() as lines:
            stamps = [json.loads(line)["timestamp"] / 1e3 for line in lines]
        found.append((path.stem, 10.0, by_steps(stamps, 10.0)))
    return found


def synthetic() -> list[tuple[str, float, list[float]]]:
    source = random.Random(7)
    day = [50 + 40 * math.sin(2 * math.pi * k / 144) for k in range(144 * 10)]
    noisy = [rate * math.exp(source.gauss(0, 0.1)) for rate in day]
    steps = [(20.0 if k // 200 % 2 else 100.0) * math.exp(source.gauss(0, 0.05)) for k in range(1500)]
    walk, level = [], 3.0
    for _ in range(1500):
        level += source.gauss(0, 0.03) - 0.01 * (level - 3.0)
        walk.append(math.exp(level))
    return [("synthetic day", 600.0, noisy), ("synthetic steps", 10.0, steps), ("synthetic walk", 10.0, walk)]


def rule_for(step: float, horizon: int) -> ForecastRule:
    """As the planner runs it: the level over two steps, the profile only where days are in sight."""
    return ForecastRule(step_seconds=step, horizon_steps=horizon, level_seconds=max(60.0, 0.5 * step), daily=step >= 60)


def run(rates: list[float], rule: ForecastRule) -> tuple[float, float, float]:
    """(cover of the upper bound, its mean over the mean rate, mean absolute error of the point over the mean rate)."""
    state, bounds, points = ForecastState(), {}, {}
    for number, rate in enumerate(rates):
        state = fold(state, rule, rate, rule.step_seconds, number * rule.step_seconds + 0.5 * rule.step_seconds)
        seen = outlook(state, rule)
        if seen is not None:
            bounds[number - 1 + rule.horizon_steps] = seen.upper
            points[number - 1 + rule.horizon_steps] = seen.point
    due = [number for number in bounds if number < len(rates)]
    mean = sum(rates[number] for number in due) / len(due)
    over = sum(bounds[number] for number in due) / len(due) / mean - 1.0
    error = sum(abs(points[number] - rates[number]) for number in due) / len(due) / mean
    return state.hits[0] / max(1, state.hits[1]), over, error


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="planner_forecast", description=__doc__)
    parser.add_argument("--traces", type=Path, help="folder with public traces")
    options = parser.parse_args(arguments)
    data = series(options.traces) if options.traces else synthetic()
    if not data:
        print(f"no trace in {options.traces}; see the head of this file for the names", file=sys.stderr)
        return 2
    print(
        f"{'series':34}{'ahead':>9}{'cover':>8}{'over':>8}{'error':>8}"
        f"   last value: {'cover':>8}{'over':>8}{'error':>8}"
    )
    good = True
    for name, step, rates in data:
        for horizon in (1, 2) if step >= 60 else (4, 10):
            rule = rule_for(step, horizon)
            cover, over, error = run(rates, rule)
            last = ForecastRule(step_seconds=step, horizon_steps=horizon, level_seconds=1e-9, daily=False, is_flat=True)
            peer = run(rates, last)
            good &= LOW <= cover <= HIGH
            figures = f"{cover:8.1%}{over:8.1%}{error:8.1%}   {'':12}{peer[0]:8.1%}{peer[1]:8.1%}{peer[2]:8.1%}"
            print(f"{name:34}{horizon * step:7.0f} s{figures}")
    if not options.traces:
        print("synthetic series: no verdict; give --traces")
        return 0
    print("every cover lies between 93 and 97 %" if good else "a cover lies OUTSIDE 93..97 %")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
