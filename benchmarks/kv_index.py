"""The proxy's exact index: memory of a whole process, and CPU time for each block stored, removed and looked up.

    python -m benchmarks kv_index [--blocks N] [--rounds N] [--against CHECKOUT]

Every round is a process of its own; with CHECKOUT (another commit's working tree) the two alternate. Events carry 16
blocks of 16 tokens each; a look-up is a prompt of 512 blocks that one of eight engines holds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

_BLOCK, _EVENT, _PROMPT, _ENGINES = 16, 16, 512, 8


def resident_mb() -> float:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(blocks: int) -> dict[str, float]:
    """One filled index, in this process."""
    importlib.import_module("dynamo_proxy.server")  # what a proxy has loaded
    from dynamo_proxy.block_hash import root_hash, token_chain
    from dynamo_proxy.kv_events import BlocksRemoved, BlocksStored
    from dynamo_proxy.kv_index import KvIndex

    source, index, empty = random.Random(1), KvIndex(), resident_mb()
    stored_seconds, removed_seconds, chains = 0.0, 0.0, []
    for prompt in range(blocks // _PROMPT):
        tokens = tuple(source.randrange(150_000) for _ in range(_PROMPT * _BLOCK))
        names = tuple(source.getrandbits(64) for _ in range(_PROMPT))
        events = []
        for start in range(0, _PROMPT, _EVENT):
            parent = names[start - 1] if start else None
            some = tokens[start * _BLOCK : (start + _EVENT) * _BLOCK]
            hashes = names[start : start + _EVENT]
            events.append(BlocksStored(hashes, parent, some, _BLOCK, "GPU", "", "", (), -1, False))
        began = time.thread_time()
        for event in events:
            index.apply(prompt % _ENGINES, 0, event)
        stored_seconds += time.thread_time() - began
        if prompt % 100 == 0:
            chains.append((prompt % _ENGINES, token_chain(tokens, _BLOCK, root_hash("", "")), names))
    full = resident_mb()
    looks = []
    for slot, chain, _ in chains:
        began = time.thread_time()
        found = index.walk(chain, (1 << _ENGINES) - 1)
        looks.append(time.thread_time() - began)
        assert found == {slot: _PROMPT}, "the index does not know what it was told"
    for slot, _, names in chains:
        began = time.thread_time()
        index.apply(slot, 0, BlocksRemoved(names, "GPU", -1))
        removed_seconds += time.thread_time() - began
    return {
        "empty_mb": empty,
        "full_mb": full,
        "store_us": stored_seconds / (blocks // _PROMPT * _PROMPT) * 1e6,
        "remove_us": removed_seconds / (len(chains) * _PROMPT) * 1e6,
        "look_up_us": statistics.median(looks) * 1e6,
    }


def in_process(checkout: Path, blocks: int) -> dict[str, float]:
    """One round in a process of its own, on the code of a checkout."""
    environment = {**os.environ, "PYTHONPATH": f"{checkout / 'routing_proxy'}:{Path(__file__).parents[1]}"}
    command = [
        sys.executable,
        "-c",
        f"import json; from benchmarks.kv_index import measure; print(json.dumps(measure({blocks})))",
    ]
    said = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    row: dict[str, float] = json.loads(said.stdout)
    return row


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kv_index")
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path)
    options = parser.parse_args(arguments)
    checkouts = {"now": Path(__file__).parents[1]}
    if options.against is not None:
        checkouts["before"] = options.against.resolve()
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for _ in range(options.rounds):
        for name, checkout in checkouts.items():
            rows[name].append(in_process(checkout, options.blocks))
    print(f"{options.blocks} blocks, medians of {options.rounds}")
    for name, found in rows.items():
        middle = {key: statistics.median(row[key] for row in found) for key in found[0]}
        print(f"{name:<8}" + "  ".join(f"{key} {value:.1f}" for key, value in middle.items()))
    return 0
