"""Request streams of known shapes: rates from ServeGen or drawn here, lengths from Azure's conversations."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BLOCK_TOKENS = 512
_BURSTINESS = 20.0  # shape of the gamma that modulates every second: a coefficient of variation of 0.22


def servegen(folder: Path, model: str, start_hours: float) -> Callable[[float], float]:
    """Rate over seconds, linear between the 10-minute points."""
    with (folder / f"servegen_{model}_10min.csv").open() as lines:
        rates = [float(row["rate_rps"]) for row in csv.DictReader(lines)]

    def rate(seconds: float) -> float:
        place = (start_hours * 3600.0 + seconds) / 600.0
        low = min(int(place), len(rates) - 2)
        return rates[low] + (place - low) * (rates[low + 1] - rates[low])

    return rate


def burst(share: float) -> float:
    """Quiet, five times as much from one second to the next for a fifth of the stream, quiet again."""
    return 5.0 if 0.4 <= share < 0.6 else 1.0


def slow_day(share: float) -> float:
    """A day pressed into the stream: from a third of the mean to almost twice and back."""
    return 1.0 + 0.7 * math.sin(2 * math.pi * (share - 0.25))


def lengths(folder: Path) -> list[tuple[int, int]]:
    with (folder / "azure2023_conv.csv").open() as lines:
        pairs = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(lines)]
    return [(prompt, output) for prompt, output in pairs if prompt > 0 and output > 0]


SHAPES = ("m-large", "m-small", "burst", "slow-day")


def rate_of(name: str, folder: Path, seconds: float) -> Callable[[float], float]:
    if name == "m-large":
        return servegen(folder, "m-large", 232.5)  # triples within twenty minutes
    if name == "m-small":
        return servegen(folder, "m-small", 30.0)
    drawn = burst if name == "burst" else slow_day
    return lambda second: drawn(second / seconds)


@dataclass(frozen=True)
class Stream:
    """One stream to write: its shape, its length and its mean rate."""

    shape: str
    hours: float
    mean_rps: float = 14.0
    seed: int = 0


def write_trace(path: Path, stream: Stream, folder: Path) -> int:
    """Write the stream as the replay reads it; returns the number of requests."""
    source, seconds = random.Random(stream.seed), int(stream.hours * 3600)
    rate = rate_of(stream.shape, folder, seconds)
    scale = stream.mean_rps / (sum(rate(second) for second in range(seconds)) / seconds)
    pairs, block, count = lengths(folder), 0, 0
    with path.open("w") as file:
        for second in range(seconds):
            now = scale * rate(second) * source.gammavariate(_BURSTINESS, 1 / _BURSTINESS)
            for offset in sorted(source.random() for _ in range(_poisson(source, now))):
                prompt, output = pairs[source.randrange(len(pairs))]
                blocks = -(-prompt // BLOCK_TOKENS)
                entry = {
                    "timestamp": int((second + offset) * 1000),
                    "input_length": prompt,
                    "output_length": output,
                    "hash_ids": list(range(block, block + blocks)),
                }
                file.write(json.dumps(entry) + "\n")
                block, count = block + blocks, count + 1
    return count


def _poisson(source: random.Random, mean: float) -> int:
    count, left = 0, mean
    while left > 0:
        left -= source.expovariate(1.0)
        count += left > 0
    return count
