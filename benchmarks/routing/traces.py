"""Requests to replay: a Mooncake-format trace, or agentic sessions made here."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from benchmarks.routing.simulated import BLOCK_TOKENS

_MOST_TOKENS = 400_000


@dataclass(frozen=True)
class Arrival:
    seconds: float
    blocks: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int


def read_mooncake(path: Path, count: int, load: float) -> list[Arrival]:
    """The first `count` requests of a trace. Its timestamps are quantised to seconds; those of a bunch are spread."""
    rows = [row for line in path.open() if (row := json.loads(line))["input_length"] < _MOST_TOKENS][:count]
    source = random.Random(5)
    arrivals: list[Arrival] = []
    start = 0
    while start < len(rows):
        moment = rows[start]["timestamp"]
        stop = start
        while stop < len(rows) and rows[stop]["timestamp"] == moment:
            stop += 1
        following = rows[stop]["timestamp"] if stop < len(rows) else moment + 1000
        offsets = sorted(source.random() for _ in range(start, stop))
        for row, offset in zip(rows[start:stop], offsets, strict=True):
            seconds = (moment + offset * (following - moment)) / 1000 / load
            tokens, made = row["input_length"], max(1, row["output_length"])
            arrivals.append(Arrival(seconds, tuple(row["hash_ids"]), tokens, made))
        start = stop
    return arrivals


def agentic(count: int, load: float) -> list[Arrival]:
    """Sessions of many turns: each prompt is the one before, its answer, and a tool's result."""
    source = random.Random(11)
    arrivals: list[Arrival] = []
    fresh = iter(range(1, 1 << 40))
    systems = [tuple(next(fresh) for _ in range(source.randint(4, 12))) for _ in range(6)]
    begun = 0.0
    while len(arrivals) < count:
        begun += source.expovariate(0.35 * load)
        moment, blocks = begun, source.choice(systems)
        for _ in range(source.randint(4, 24)):
            blocks += tuple(next(fresh) for _ in range(source.randint(1, 5)))
            made = source.randint(40, 400)
            arrivals.append(Arrival(moment, blocks, len(blocks) * BLOCK_TOKENS + source.randint(1, 500), made))
            moment += made * 0.02 + source.expovariate(1 / 4.0) / load
    arrivals.sort(key=lambda arrival: arrival.seconds)
    return arrivals[:count]
