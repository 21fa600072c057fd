"""`python -m soak`: load and faults on a real vLLM with every tier; status 1 for a wrong or lost answer, or a leak.

The right answers come from the same vLLM without us. Everything runs in float32: rounding then does not depend on which
requests share a batch, so answers are compared token for token.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

from soak.faults import System, break_things
from soak.object_store import BUCKET, SECRETS, BreakablePipe, make_bucket, s3_server
from soak.workload import Clients, ask, prompts
from tools.server_process import ServerProcess, members_of
from tools.tiny_model import make_model
from tools.vllm_server import VllmOptions, vllm_server


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--pause-seconds", type=float, default=12.0, help="mean pause between two faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where logs and KV go (default: a temporary folder)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return run(folder, options)


def run(folder: Path, options: argparse.Namespace) -> int:
    model = make_model(folder / "model")
    right = right_answers(model, folder)
    s3 = s3_server(folder / "s3.log")
    s3.start().wait_ready()
    pipe = BreakablePipe(int(s3.url.rsplit(":", 1)[1]))
    engine = tiered_engine(model, folder, pipe.url)
    system = System(engine, folder / "kv", pipe, threading.Event(), random.Random(options.seed))
    try:
        make_bucket(s3.url)
        engine.start().wait_ready(600)
        return soak(system, right, options)
    finally:
        engine.stop()
        pipe.close()
        s3.stop()


def right_answers(model: Path, folder: Path) -> list[tuple[int, ...]]:
    stock = vllm_server("stock", model, folder / "stock.log", VllmOptions(extra=["--dtype", "float32"]))
    try:
        stock.start().wait_ready(600)
        answers = []
        for number, prompt in enumerate(prompts(), 1):
            answers.append(ask(stock.url, prompt))
            print(f"\r  right answers from stock vLLM: {number}", end="", flush=True)
        print(flush=True)
        return answers
    finally:
        stock.stop()


def tiered_engine(model: Path, folder: Path, s3_url: str) -> ServerProcess:
    """Each tier too small for all prompts, so that blocks keep sinking and rising."""
    extra = ["--dtype", "float32", "--kv-connector", "dynamo"]
    extra += ["--kvbm-storage-tiers", "hbm,host_dram,nvme_ssd,object_store", "--kvbm-host-dram-gb", "0.03"]
    extra += ["--kvbm-nvme-path", str(folder / "kv"), "--kvbm-nvme-gb", "0.06", "--kvbm-nvme-min-touches", "1"]
    extra += ["--kvbm-object-url", f"s3://{BUCKET}/kv", "--kvbm-object-endpoint-url", s3_url]
    extra += ["--kvbm-object-gb", "1", "--kvbm-object-min-touches", "1", "--kvbm-load-gate", "off"]
    engine = vllm_server("tiered", model, folder / "tiered.log", VllmOptions(extra=extra))
    engine.env = {**engine.env, **SECRETS}
    return engine


def soak(system: System, right: list[tuple[int, ...]], options: argparse.Namespace) -> int:
    clients = Clients(system.engine.url, right, lambda: system.outages)
    breaker = threading.Thread(target=break_things, args=(system, options.pause_seconds))
    started = time.monotonic()
    clients.start()
    breaker.start()
    try:
        while (left := options.minutes * 60 - (time.monotonic() - started)) > 0 and breaker.is_alive():
            time.sleep(min(30.0, left))
            print(f"  {time.monotonic() - started:6.0f} s  {dict(clients.tally.ended)}", flush=True)
    finally:
        broke_down = not breaker.is_alive()
        system.stopping.set()
        breaker.join()
        clients.stop()
    leaks = leaks_of(system, right)
    return report(system, clients, leaks, broke_down)


def leaks_of(system: System, right: list[tuple[int, ...]]) -> list[str]:
    """What grows or stays when the same load runs twice without faults, and then ends."""
    before = _held(system.engine, right)
    after = _held(system.engine, right)
    grown = [
        f"{what}: {before[what]} -> {after[what]}" for what in ("threads", "descriptors") if after[what] > before[what]
    ]
    return grown + [f"{what}: {amount}" for what, amount in after.items() if what not in before and amount]


def _held(engine: ServerProcess, right: list[tuple[int, ...]]) -> dict[str, float]:
    clients = Clients(engine.url, right, lambda: 0)
    clients.start()
    time.sleep(30)
    clients.stop()
    time.sleep(5)
    assert engine.process is not None
    processes = members_of(engine.process.pid)
    return {
        "threads": sum(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in processes),
        "descriptors": sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in processes),
    }


def report(system: System, clients: Clients, leaks: list[str], broke_down: bool) -> int:
    ended = clients.tally.ended
    print(f"requests {sum(ended.values())}: {dict(ended)}")
    print(f"faults   {sum(system.done.values())}: {dict(system.done)}")
    print(f"wrong answers {ended['wrong']}, hung {ended['hung']}, failed {ended['failed']}, leaks {len(leaks)}")
    for line in [*clients.tally.faults[:20], *leaks]:
        print(f"  {line}")
    if broke_down:
        print("the faults ended early: the engine did not come back")
    return 1 if clients.tally.faults or leaks or broke_down else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
