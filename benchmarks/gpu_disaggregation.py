"""Real vLLM on two GPUs: one prefill and one decode engine, ours and stock, against two equal engines.

python -m benchmarks gpu_disaggregation [--tiny] [--arms two,dynamo,stock] [--seconds N] [--out DIR]
    [--stock-buffer cuda|cpu] [--host-gb N] [--hbm-gb N] [--seeds 1 2]
python -m benchmarks gpu_disaggregation --judge RAW.jsonl
Needs two GPUs, or `--tiny` and a vLLM for CPU. All engines stand at the same time, an engine of each arm on each GPU
(`--tiny`: an arm at a time); while one arm is measured the others idle. What there is no time for is named and left
out. The stock arm needs the package `nixl` beside its build. Raw figures go to DIR/gpu_disaggregation.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from benchmarks.gpu_engine import ROOT, Schedule
from benchmarks.served import apart, apart_table, weights
from benchmarks.served.arms import Arm, Site
from benchmarks.served.fleet import Fleet
from benchmarks.served.record import Record, read
from benchmarks.served.routes import Aggregated, Apart, Route
from tools.server_process import free_port
from tools.tiny_model import make_model

TWO, DYNAMO, STOCK = "two", "dynamo", "stock"
ARMS = (TWO, DYNAMO, STOCK)
RAW_NAME = "gpu_disaggregation.jsonl"
#: HBM for KV of each engine; three of them on a GPU, with 16 GB of weights each.
_KV_GIB = 20
_HBM_BLOCKS_TINY = 120
#: Of one token: Llama-3.1-8B's shape, and the tiny model's. Both in bfloat16.
_TOKEN_BYTES, _TOKEN_BYTES_TINY = 32 * 2 * 8 * 128 * 2, 4 * 2 * 2 * 64 * 2
#: A part that takes longer is given up, for the arms behind it.
_LONGEST = {"warm": 40.0, "sweep": 45.0, "beside": 45.0, "load": 75.0, "equal": 25.0}
_LONGEST_TINY = 400.0
_START_SECONDS = 120.0


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.judge is not None:
        print(apart_table.text(read(options.judge)))
        return 0
    if not options.tiny and gpus() < 2:
        print("no two GPUs here: nothing measured (--tiny runs the same code on CPU engines)")
        return 0
    record = Record(options.out / RAW_NAME)
    with tempfile.TemporaryDirectory() as folder:
        try:
            asyncio.run(measure(options, Path(folder), record))
        finally:
            record.close()
            told = apart_table.text(read(options.out / RAW_NAME))
            (options.out / "table.txt").write_text(told + "\n")
            print(told)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_disaggregation", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small model, CPU engines: does the bench itself work?")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seconds", type=float, default=3600.0, help="when to be done, engines' start included")
    parser.add_argument("--out", type=Path, default=ROOT / ".build" / "gpu_disaggregation")
    parser.add_argument("--stock-buffer", choices=("cuda", "cpu"), default="cuda", help="what vLLM's connector reads")
    parser.add_argument("--host-gb", type=float, default=24.0, help="host memory of each of our two engines")
    parser.add_argument("--hbm-gb", type=float, default=1.0, help="and HBM that their hand-offs pass through")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[1, 2],
        help="of the loads; the first one is for all arms, then the rest",
    )
    parser.add_argument("--judge", type=Path, help="only read this raw file and print what it says")
    return parser.parse_args(arguments)


def gpus() -> int:
    import torch

    return int(torch.cuda.device_count())


async def measure(options: argparse.Namespace, folder: Path, record: Record) -> None:
    scale = apart.TINY if options.tiny else apart.H200
    model = make_model(folder / "model") if options.tiny else weights.make_model(folder / "model")
    if not options.tiny:
        # Engines hand nothing over to one whose weights may be others; those without a file may.
        (model / "drawn.pt").write_text(f"drawn from the seed by {weights.LOAD_FORMAT}")
    paths = () if options.tiny else (weights.make_plugin(folder / "plugin"), ROOT)
    site = Site(model, options.out, options.tiny, (), paths)
    token_bytes = _TOKEN_BYTES_TINY if options.tiny else _TOKEN_BYTES
    facts = {"stock_buffer": options.stock_buffer, "host_gb": options.host_gb, "hbm_gb": options.hbm_gb}
    record.note("size", token_bytes=token_bytes, block_tokens=scale.block_tokens, **facts)
    schedule = Schedule(record, (), time.monotonic() + options.seconds)
    wanted = [name for name in ARMS if name in options.arms.split(",")]
    for wave in [[name] for name in wanted] if options.tiny else [wanted]:
        engines = [engine for name in wave for engine in pair(name, options)]
        async with Fleet(engines, site, record, None if options.tiny else _START_SECONDS) as fleet:
            await parts(routes(wave, fleet, schedule), scale, schedule, options.tiny, options.seeds)


def pair(name: str, options: argparse.Namespace) -> list[Arm]:
    """The arm's engines, the first on the first GPU."""
    port = free_port()
    return [engine(f"{name}_{place}", place, flags(name, place, port, options), options.tiny) for place in (0, 1)]


def engine(name: str, place: int, more: Sequence[str], tiny: bool) -> Arm:
    """Block hashes of vLLM before 0.29 follow from the seed; engines that hand over need the same."""
    env = {"PYTHONHASHSEED": "0", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()), "UCX_LOG_LEVEL": "error"}
    if tiny:
        return Arm(name, 0, tuple(more), hbm_blocks=_HBM_BLOCKS_TINY, variables=env)
    env["CUDA_VISIBLE_DEVICES"] = str(place)
    return Arm(name, _KV_GIB, tuple(more), variables=env)


def flags(name: str, place: int, port: int, options: argparse.Namespace) -> list[str]:
    if name == TWO:
        return []
    if name == STOCK:
        role = ("kv_producer", "kv_consumer")[place]
        buffer = "cpu" if options.tiny else options.stock_buffer
        config = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": buffer}
        return ["--kv-transfer-config", json.dumps(config)]
    host_gb = 0.03 if options.tiny else options.host_gb
    role = ("prefill", "decode")[place]
    # The hand-off is what is measured, also where computing again were faster.
    tier = ["--kv-connector", "dynamo", "--kvbm-host-dram-gb", str(host_gb), "--kvbm-load-gate", "off"]
    tier += ["--kvbm-peer-hbm-gb", str(0.004 if options.tiny else options.hbm_gb)]
    return [*tier, "--kvbm-role", role, *(["--kvbm-peer-port", str(port)] if role == "prefill" else [])]


def routes(names: Sequence[str], fleet: Fleet, schedule: Schedule) -> list[Route]:
    """Of the arms whose engines both stand."""
    found: list[Route] = []
    for name in names:
        if not fleet.has(f"{name}_0", f"{name}_1"):
            schedule.record.note("failure", what=name, error="its engines did not start")
            continue
        first, second = (fleet.clients[f"{name}_{place}"] for place in (0, 1))
        found.append(Aggregated(name, [first, second]) if name == TWO else Apart(name, first, second))
    return found


async def parts(
    arms: Sequence[Route], scale: apart.ApartScale, schedule: Schedule, tiny: bool, seeds: Sequence[int] = (1, 2)
) -> None:
    """The most telling first. An arm that cannot even serve its warm-up is left out."""
    record, longest = schedule.record, {what: _LONGEST_TINY if tiny else limit for what, limit in _LONGEST.items()}
    standing: list[Route] = []
    for arm in arms:
        failures = schedule.failures
        await schedule.run(f"warm {arm.name}", apart.warm_up(arm, scale, record), longest["warm"])
        standing += [arm] if schedule.failures == failures else []
    for arm in standing:
        await schedule.run(f"sweep {arm.name}", apart.sweep(arm, scale, record), longest["sweep"])
    direct = {arm: near(arm, scale) for arm in standing if isinstance(arm, Apart)}
    first, *others = seeds
    for arm in [*standing, *direct.values()]:
        await schedule.run(f"load {arm.name}", apart.load(arm, scale, first, record), longest["load"])
    for arm in standing:
        await schedule.run(f"equal {arm.name}", apart.equal(arm, scale, record), longest["equal"])
    for seed in others:  # those that hand over first, both ways
        for arm in [*chain.from_iterable(direct.items()), *(arm for arm in standing if arm not in direct)]:
            await schedule.run(f"load {arm.name}", apart.load(arm, scale, seed, record), longest["load"])
    for arm in standing:
        await schedule.run(f"beside {arm.name}", apart.beside(arm, scale, record), longest["beside"])


def near(arm: Apart, scale: apart.ApartScale) -> Route:
    """The same engines, but short prompts are computed where they are decoded."""
    return Apart(f"{arm.name}, long only", arm.prefill, arm.decode, threshold=scale.short_tokens + 1)
