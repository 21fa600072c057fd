"""`python -m soak`: load and faults on a real vLLM with every tier; status 1 for a wrong or lost answer, or a leak.

The right answers come from the same vLLM without us. Everything runs in float32: rounding then does not depend on which
requests share a batch, so answers are compared token for token, and blocks float for float wherever they are copied.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from soak.faults import System, break_things
from soak.object_store import BUCKET, SECRETS, BreakablePipe, make_bucket, s3_server
from soak.truth import RIGHT, UNKNOWN, compare_slabs, load_rows, read_rows, save_rows, watch_variables
from soak.workload import Answer, Clients, Tally, ask, distinct_blocks, prompts
from tools.server_process import ServerProcess, members_of
from tools.tiny_model import make_model
from tools.vllm_server import VllmOptions, vllm_server

TIERS = ("hbm", "host_dram", "nvme_ssd", "object_store")


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
    rows = right_blocks(model, folder)
    s3 = s3_server(folder / "s3.log")
    s3.start().wait_ready()
    pipe = BreakablePipe(int(s3.url.rsplit(":", 1)[1]))
    engine = tiered_engine(model, folder, pipe.url)
    watched = folder / "watched.txt"
    engine.env = {**engine.env, **watch_variables(rows, watched)}
    system = System(engine, folder / "kv", pipe, threading.Event(), random.Random(options.seed))
    on_disk: list[str] = []
    known = load_rows(rows)
    system.inspect = lambda: on_disk.extend(compare_slabs(known, system.slabs))
    try:
        make_bucket(s3.url)
        engine.start().wait_ready(600)
        tally, quiet = soak(system, right, options)
        return report(system, tally, [*quiet, *on_disk, *told(watched)])
    finally:
        engine.stop()
        pipe.close()
        s3.stop()


def right_answers(model: Path, folder: Path) -> list[Answer]:
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


def right_blocks(model: Path, folder: Path) -> Path:
    """The KV of every block, from an engine that is left in peace, as a file of rows."""
    slabs, rows = folder / "right-kv", folder / "rows.npz"
    slabs.mkdir(exist_ok=True)
    tiers = ["--kvbm-storage-tiers", "hbm,host_dram,nvme_ssd", "--kvbm-host-dram-gb", "0.3", "--kvbm-nvme-gb", "0.2"]
    disk = ["--kvbm-nvme-path", str(slabs), "--kvbm-nvme-min-touches", "1"]
    extra = ["--dtype", "float32", "--kv-connector", "dynamo", *tiers, *disk]
    engine = vllm_server("peaceful", model, folder / "peaceful.log", VllmOptions(extra=extra))
    try:
        engine.start().wait_ready(600)
        for prompt in prompts():
            ask(engine.url, prompt)
        deadline = time.monotonic() + 120
        while len(found := read_rows(slabs)) < distinct_blocks() and time.monotonic() < deadline:
            time.sleep(1)
    finally:
        engine.stop()
    print(f"  right blocks: {len(found)} of {distinct_blocks()}", flush=True)
    if len(found) < distinct_blocks():
        raise SystemExit(f"soak: an engine left in peace kept only {len(found)} of {distinct_blocks()} blocks")
    save_rows(found, rows)
    return rows


def told(watched: Path) -> list[str]:
    """What the engine's own watch saw go wrong, each line once, and which copies it never saw."""
    lines = Counter(watched.read_text().splitlines() if watched.exists() else [])
    right = {line.removesuffix(RIGHT): count for line, count in lines.items() if line.endswith(RIGHT)}
    wrong = [line for line in lines if not line.endswith((RIGHT, UNKNOWN))]
    print(f"copies   {right} right, {sum(lines[line] for line in wrong)} wrong")
    wanted = ["stored", *(f"loaded from {tier}" for tier in TIERS[1:])]
    unseen = [f"no block was {what} and compared: this was not tested" for what in wanted if what not in right]
    return [*wrong, *unseen]


def tiered_engine(model: Path, folder: Path, s3_url: str) -> ServerProcess:
    """Each tier too small for all prompts, so that blocks keep sinking and rising."""
    (folder / "kv").mkdir(exist_ok=True)
    extra = ["--dtype", "float32", "--kv-connector", "dynamo"]
    extra += ["--kvbm-storage-tiers", ",".join(TIERS), "--kvbm-host-dram-gb", "0.03"]
    extra += ["--kvbm-nvme-path", str(folder / "kv"), "--kvbm-nvme-gb", "0.06", "--kvbm-nvme-min-touches", "1"]
    extra += ["--kvbm-object-url", f"s3://{BUCKET}/kv", "--kvbm-object-endpoint-url", s3_url]
    extra += ["--kvbm-object-gb", "1", "--kvbm-object-min-touches", "1", "--kvbm-load-gate", "off"]
    engine = vllm_server("tiered", model, folder / "tiered.log", VllmOptions(extra=extra))
    engine.env = {**engine.env, **SECRETS}
    return engine


def soak(system: System, right: list[Answer], options: argparse.Namespace) -> tuple[Tally, list[str]]:
    """How requests ended under faults, and what went wrong in the quiet hours after them."""
    clients = Clients(system.engine.url, right, lambda: system.outages)
    teller = threading.Thread(target=tell, args=(clients.tally, system.stopping))
    end = threading.Timer(options.minutes * 60, system.stopping.set)
    for thread in (clients, teller, end):
        thread.start()
    try:
        # On this thread: the kernel ends an engine with the thread that started it.
        break_things(system, options.pause_seconds)
    finally:
        end.cancel()
        system.stopping.set()
        teller.join()
        clients.stop()
    return clients.tally, quiet_hours(system.engine, right)


def tell(tally: Tally, stopping: threading.Event) -> None:
    started = time.monotonic()
    while not stopping.wait(30):
        print(f"  {time.monotonic() - started:6.0f} s  {dict(tally.ended)}", flush=True)


def quiet_hours(engine: ServerProcess, right: list[Answer]) -> list[str]:
    """What goes wrong, grows or stays when the same load runs twice without faults, and then ends."""
    (before, first), (after, second) = _load(engine, right), _load(engine, right)
    grown = [f"{what}: {before[what]} -> {after[what]}" for what in before if after[what] > before[what]]
    return [*first.faults, *second.faults, *grown, *still_held(engine)]


def _load(engine: ServerProcess, right: list[Answer]) -> tuple[dict[str, int], Tally]:
    clients = Clients(engine.url, right, lambda: 0)
    clients.start()
    time.sleep(40)
    clients.stop()
    time.sleep(5)
    assert engine.process is not None
    folders = [Path(f"/proc/{process}") for process in members_of(engine.process.pid)]
    held = {what: sum(len(list((each / what).iterdir())) for each in folders) for what in ("task", "fd")}
    return held, clients.tally


def still_held(engine: ServerProcess) -> list[str]:
    """Gauges of an idle engine that must be zero."""
    with urllib.request.urlopen(engine.url + "/metrics", timeout=30) as answer:
        text = answer.read().decode()
    zero = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "dynamo_kvbm_pinned_blocks")
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return [
        f"{each.name}{each.labels} is {each.value} when idle" for each in samples if each.name in zero and each.value
    ]


def report(system: System, tally: Tally, found_later: list[str]) -> int:
    ended = tally.ended
    print(f"requests {sum(ended.values())}: {dict(ended)}")
    print(f"faults   {sum(system.done.values())}: {dict(system.done)}")
    print(
        f"wrong answers {ended['wrong']}, hung {ended['hung']}, failed {ended['failed']}, afterwards {len(found_later)}"
    )
    for line in [*tally.faults[:20], *found_later]:
        print(f"  {line}")
    return 1 if tally.faults or found_later else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
