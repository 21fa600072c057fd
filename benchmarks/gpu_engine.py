"""Real vLLM, tiered: answers bit for bit after reload, TTFT of a long prefix, disk, load without hits, chats.

python -m benchmarks gpu_engine [--tiny] [--parts exact,prefix,load,chat] [--arms none,native,dynamo]
    [--out DIR] [--disk DIR] [--flag FLAG ...]
python -m benchmarks gpu_engine --judge RAW.jsonl
Needs a GPU with about 130 GB, or `--tiny` and a vLLM for CPU. Raw figures go to DIR/gpu_engine.jsonl as they come.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Sequence
from pathlib import Path

from benchmarks.served import arms as lines
from benchmarks.served import chat, disk, exactness, prefix, throughput, verdict, weights
from benchmarks.served.arms import Arm, Site
from benchmarks.served.fleet import Fleet
from benchmarks.served.record import Record, read
from benchmarks.served.scale import H200, TINY, Scale
from tools.tiny_model import make_model

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("exact", "prefix", "load", "chat")
#: Never timed.
EXACT_ARMS = (lines.EXACT_REFERENCE, lines.EXACT)
_LONGEST_PART_SECONDS = 240


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
    parser.add_argument(
        "--arms", default=f"{lines.NONE},{lines.NATIVE},{lines.DYNAMO_ARM}", help="of prefix, load and chat"
    )
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
    needed = [*(EXACT_ARMS if "exact" in parts else ()), *(wanted if {"prefix", "load", "chat"} & set(parts) else ())]
    async with Fleet(chosen(arms, needed), site, record) as fleet:
        await all_parts(fleet, scale, record, parts)


def chosen(arms: dict[str, Arm], names: Sequence[str]) -> list[Arm]:
    """Those that exist at this scale: vLLM's own offloading and compression need a GPU."""
    return [arms[name] for name in dict.fromkeys(names) if name in arms]


def floors(folder: Path) -> dict[str, object]:
    command = [sys.executable, "-m", "benchmarks.served.floors", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr[-2000:]}
    facts: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return facts


async def all_parts(fleet: Fleet, scale: Scale, record: Record, parts: Sequence[str]) -> None:
    """In this order: `exact` and `load` push out of DRAM what `disk` and `gate` want to find on the disk alone."""
    clients = fleet.clients
    timed = [client for name, client in clients.items() if name not in EXACT_ARMS]
    compared = [client for client in timed if client.name in (lines.NONE, lines.DYNAMO_ARM)]
    if "exact" in parts and fleet.has(*EXACT_ARMS):
        reference, tiered = (clients[name] for name in EXACT_ARMS)
        await guarded("disk store", disk.store(tiered, scale, record), record)
        await guarded("exact", exactness.run(reference, tiered, scale, record), record)
        await guarded("disk load", disk.load(tiered, scale, record), record)
    if "prefix" in parts:
        await guarded("prefix", prefix.run(timed, scale, record), record)
    if "load" in parts:
        await guarded("load", throughput.run(compared, scale, record), record)
    if {"prefix", "load"} <= set(parts) and fleet.has(lines.DYNAMO_ARM):
        await guarded("gate", disk.gate(clients[lines.DYNAMO_ARM], prefix.make_prompts(scale), record), record)
    if "chat" in parts:
        await guarded("chat", chat.run(compared, scale, record), record)


async def guarded(what: str, part: Awaitable[None], record: Record) -> None:
    """A part that fails or hangs is recorded; the ones after it still run, because the machine is only lent."""
    try:
        await asyncio.wait_for(part, _LONGEST_PART_SECONDS)
    except Exception as error:  # noqa: BLE001 - whatever it was, it is in the record
        record.note("failure", what=what, error=f"{type(error).__name__}: {error}")
        record.say(f"{what} failed: {type(error).__name__}: {error}")
