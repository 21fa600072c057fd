"""TTFT of a prompt whose KV lies in each tier, against computing it, on real CPU engines.

`python -m benchmarks tier_ttft [vllm] [sglang]`. Each engine starts three times over one disk and one S3 server: with
all tiers (cold, HBM, DRAM), with an empty memory (NVMe), and with an empty memory and no disk (object store). The load
gate is off: a model this small may be computed faster than it is read, which the gate would see. Answers must equal
the cold ones.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.tier_engines import ENGINES, PROMPT_TOKENS, Answer, Engine, Prompt
from soak.object_store import make_bucket, s3_server
from tools.server_process import ServerProcess
from tools.tiny_model import make_model

PROMPTS = 6
SETTLE_SECONDS = 120.0
#: What each start is given besides HBM and host memory.
ALL, DISK, OBJECTS = ("nvme_ssd", "object_store"), ("nvme_ssd",), ("object_store",)


@dataclass(frozen=True)
class Row:
    """One line of the table. `hit_blocks` is what the engine's own /metrics counted for the tier; None above DRAM."""

    source: str
    answers: list[Answer]
    hit_blocks: float | None = None


def measure(engine: Engine, folder: Path, s3_url: str) -> list[Row]:
    rng = random.Random(4)
    prompts = [random_prompt(rng) for _ in range(PROMPTS)]
    with started(engine, folder, ALL, s3_url) as server:
        engine.ask(server.url, random_prompt(rng))
        pairs = [(engine.ask(server.url, prompt), engine.ask(server.url, prompt)) for prompt in prompts]
        rows = [Row("cold", [cold for cold, _ in pairs]), Row("HBM", [hit for _, hit in pairs])]
        blocks = (1 + PROMPTS) * (PROMPT_TOKENS // engine.block_tokens)
        wait_until(partial(has_stored, engine, server.url, blocks), "the object store has every prompt")
        engine.empty_hbm(server.url, lambda: random_prompt(rng))
        rows.append(hits(engine, server.url, "DRAM", prompts))
    for source, tiers in (("NVMe", DISK), ("object store", OBJECTS)):
        with started(engine, folder, tiers, s3_url) as server:
            engine.ask(server.url, random_prompt(rng))
            wait_until(partial(knows, engine, server.url, tiers[0]), f"{engine.name} knows what the {source} holds")
            rows.append(hits(engine, server.url, source, prompts))
    return rows


def has_stored(engine: Engine, url: str, blocks: int) -> bool:
    engine.step(url)
    return engine.offloaded(url, "object_store") >= blocks


def knows(engine: Engine, url: str, tier: str) -> bool:
    engine.step(url)
    return engine.knows(url, tier)


def hits(engine: Engine, url: str, source: str, prompts: list[Prompt]) -> Row:
    tier = {"DRAM": "host_dram", "NVMe": "nvme_ssd", "object store": "object_store"}[source]
    before = engine.hit_blocks(url, tier)
    answers = [engine.ask(url, prompt) for prompt in prompts]
    return Row(source, answers, engine.hit_blocks(url, tier) - before)


@contextmanager
def started(engine: Engine, folder: Path, tiers: tuple[str, ...], s3_url: str) -> Iterator[ServerProcess]:
    server = engine.server(folder, tiers, s3_url)
    print(f"  starting {engine.name} with hbm,host_dram,{','.join(tiers)}", flush=True)
    try:
        server.start().wait_ready(600)
        yield server
    finally:
        server.stop()


def random_prompt(rng: random.Random) -> Prompt:
    return [rng.randrange(10, 500) for _ in range(PROMPT_TOKENS)]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SETTLE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"tier_ttft: waited {SETTLE_SECONDS:.0f} s in vain until {what}")
        time.sleep(0.2)


def show(engine: Engine, rows: list[Row]) -> bool:
    cold = [answer.tokens for answer in rows[0].answers]
    first = statistics.median(answer.ttft_seconds for answer in rows[0].answers)
    print(f"\n{engine.name}: {PROMPTS} prompts of {PROMPT_TOKENS} tokens, medians")
    print(f"{'KV comes from':<16}{'TTFT ms':>9}{'vs cold':>9}{'hit blocks':>12}{'answers equal cold':>20}")
    equal = True
    for row in rows:
        ttft = statistics.median(answer.ttft_seconds for answer in row.answers)
        same = [answer.tokens for answer in row.answers] == cold
        equal &= same
        blocks = "" if row.hit_blocks is None else f"{row.hit_blocks:.0f}"
        print(f"{row.source:<16}{ttft * 1e3:>9.0f}{ttft / first:>9.2f}{blocks:>12}{'yes' if same else 'NO':>20}")
    return equal


def main(arguments: list[str]) -> int:
    """Returns 1 when an answer differs from the cold one."""
    unknown = [name for name in arguments if name not in ENGINES]
    if unknown:
        print(f"tier_ttft: no engine {unknown[0]!r}; there are: {', '.join(ENGINES)}", file=sys.stderr)
        return 2
    equal = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make_model(folder / "model")
        s3 = s3_server(folder / "s3.log")
        try:
            s3.start().wait_ready()
            make_bucket(s3.url)
            for name in arguments or list(ENGINES):
                engine = ENGINES[name](model)
                equal &= show(engine, measure(engine, folder / name, s3.url))
        finally:
            s3.stop()
    return 0 if equal else 1
