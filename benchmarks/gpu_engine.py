"""Real vLLM, tiered: TTFT of a long prefix, raw and compressed, load without hits, gate, chats, answers bit for bit.

python -m benchmarks gpu_engine [--tiny] [--parts prefix,load,chat,exact] [--arms none,native,dynamo,dynamo_fp8]
    [--seconds N] [--out DIR] [--disk DIR] [--flag FLAG ...]
`--arms dynamo,dynamo_at_once --parts prefix` compares loads that arrive layer by layer with loads that arrive at once.
python -m benchmarks gpu_engine --judge RAW.jsonl
Needs a GPU, or `--tiny` and a vLLM for CPU. Engines that do not fit on it together run in waves. What there is no time
for is named and left out. Raw figures go to DIR/gpu_engine.jsonl as they come.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.served import arms as lines
from benchmarks.served import chat, disk, exactness, prefix, throughput, verdict, weights
from benchmarks.served.arms import Arm, Site
from benchmarks.served.fleet import Fleet
from benchmarks.served.record import Record, read
from benchmarks.served.scale import H200, TINY, Scale
from tools.tiny_model import make_model

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("prefix", "load", "chat")
#: Never timed.
EXACT_ARMS = (lines.EXACT_REFERENCE, lines.EXACT)
_LONGEST_PART_SECONDS = 240
#: A part that has less left is not begun.
_LEAST_PART_SECONDS = 15


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.judge is not None:
        print(verdict.text(read(options.judge)))
        return 0
    if not options.tiny and not has_gpu():
        print("no GPU here: nothing measured (--tiny runs the same code on a CPU engine)")
        return 0
    record = Record(options.out / "gpu_engine.jsonl")
    with tempfile.TemporaryDirectory(dir=options.disk) as folder:
        try:
            asyncio.run(measure(options, Path(folder), record))
        finally:
            record.close()
    print(verdict.text(read(options.out / "gpu_engine.jsonl")))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_engine", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small model, CPU engine: does the bench itself work?")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--arms", default=",".join(lines.TIMED), help="of prefix, load and chat")
    parser.add_argument("--seconds", type=float, default=3600.0, help="when to be done, engines' start included")
    parser.add_argument("--out", type=Path, default=ROOT / ".build" / "gpu_engine")
    parser.add_argument("--disk", type=Path, help="where the disk tier lives (default: the temporary folder)")
    parser.add_argument("--flag", action="append", default=[], help="one more vLLM flag for every arm, as --flag=--x")
    parser.add_argument("--judge", type=Path, help="only read this raw file and print what it says")
    return parser.parse_args(arguments)


def has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


async def measure(options: argparse.Namespace, folder: Path, record: Record) -> None:
    scale = TINY if options.tiny else H200
    parts, wanted = options.parts.split(","), options.arms.split(",")
    model = make_model(folder / "model") if options.tiny else weights.make_model(folder / "model")
    paths = () if options.tiny else (weights.make_plugin(folder / "plugin"), ROOT)
    site = Site(model, options.out, options.tiny, tuple(options.flag), paths)
    arms = {arm.name: arm for arm in (lines.tiny_arms if options.tiny else lines.gpu_arms)(folder)}
    record.note("machine", **floors(folder))
    record.note("prefix_size", tokens=scale.prefix.tokens, block_tokens=scale.block_tokens)
    deadline = time.monotonic() + options.seconds
    waves = [wave for wave in lines.waves(chosen(arms, wanted), gpu_bytes()) if {"prefix", "load", "chat"} & set(parts)]
    for wave in waves:
        async with Fleet(wave, site, record) as fleet:
            await timed_parts(fleet, scale, Schedule(record, parts, deadline))
    if "exact" in parts:
        async with Fleet(chosen(arms, EXACT_ARMS), site, record) as fleet:
            await exact_parts(fleet, scale, Schedule(record, parts, deadline))


def chosen(arms: dict[str, Arm], names: Sequence[str]) -> list[Arm]:
    """Those that exist at this scale: vLLM's own offloading needs a GPU."""
    return [arms[name] for name in dict.fromkeys(names) if name in arms]


def gpu_bytes() -> int | None:
    """None without a GPU."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def floors(folder: Path) -> dict[str, object]:
    command = [sys.executable, "-m", "benchmarks.served.floors", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr[-2000:]}
    facts: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return facts


@dataclass
class Schedule:
    """Runs parts one after another until `deadline` (of `time.monotonic`)."""

    record: Record
    parts: Sequence[str]
    deadline: float
    failures: int = 0

    async def run(
        self, what: str, part: Coroutine[None, None, None], longest_seconds: float = _LONGEST_PART_SECONDS
    ) -> None:
        """A part that fails or hangs is recorded; the ones after it still run, because the machine is only lent."""
        left = self.deadline - time.monotonic()
        if left < _LEAST_PART_SECONDS:
            part.close()
            self.failures += 1
            self.record.note("failure", what=what, error=f"not begun: {left:.0f} s left")
            return
        try:
            await asyncio.wait_for(part, min(left, longest_seconds))
        except Exception as error:  # noqa: BLE001 - whatever it was, it is in the record
            self.failures += 1
            self.record.note("failure", what=what, error=f"{type(error).__name__}: {error}")
            self.record.say(f"{what} failed: {type(error).__name__}: {error}")


async def timed_parts(fleet: Fleet, scale: Scale, schedule: Schedule) -> None:
    """`load` pushes out of DRAM what `gate` wants to find on the disk alone; `chat` pushes it from there too."""
    record, timed = schedule.record, list(fleet.clients.values())
    compared = [client for client in timed if client.name in (lines.NONE, lines.DYNAMO_ARM)]
    if "prefix" in schedule.parts:
        await schedule.run("prefix", prefix.run(timed, scale, record))
    if "load" in schedule.parts and compared:
        for client in timed:
            await schedule.run("settle", disk.written(client))  # what the part before left to write is not its load
        await schedule.run("load", throughput.run(compared, scale, record))
    if {"prefix", "load"} <= set(schedule.parts) and fleet.has(lines.DYNAMO_ARM):
        gated = disk.gate(fleet.clients[lines.DYNAMO_ARM], prefix.make_prompts(scale), record)
        await schedule.run("gate", gated)
    if "chat" in schedule.parts:
        # First what the goal compares: the others may find no time.
        rest = [client for client in timed if client not in compared and client.name != lines.AT_ONCE]
        await schedule.run("chat", chat.run([*compared, *rest], scale, record))


async def exact_parts(fleet: Fleet, scale: Scale, schedule: Schedule) -> None:
    """`exact` pushes out of DRAM what `disk` wants to find on the disk alone."""
    if not fleet.has(*EXACT_ARMS):
        return
    record = schedule.record
    reference, tiered = (fleet.clients[name] for name in EXACT_ARMS)
    await schedule.run("disk store", disk.store(tiered, scale, record))
    await schedule.run("exact", exactness.run(reference, tiered, scale, record))
    await schedule.run("disk load", disk.load(tiered, scale, record))
