"""Hit rates of the eviction policies on the Mooncake conversation trace, beside FIFO (floor) and Belady (ceiling).

    python -m benchmarks eviction --traces DIR      or the environment variable DYNAMO_TRACES

Blocks of 512 tokens; a hit is a block of the longest cached prefix. LRU and ARC are the ones that we ship, driven
through the block manager as an engine drives it; FIFO and Belady are written down here. `published` repeats what the
study behind our defaults measured, with a simulator of its own.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import sys
import time
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from pathlib import Path

from dynamo_connectors.block_manager import BlockManager, NamedTier
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.eviction import POLICIES
from dynamo_connectors.tiers.index import TierIndex

TRACE = "mooncake_conversation_trace.jsonl"
SHARES = (0.01, 0.03, 0.05, 0.10, 0.20, 0.40)
PUBLISHED = {
    "lru": (0.052, 0.126, 0.196, 0.279, 0.345, 0.360),
    "arc": (0.065, 0.136, 0.212, 0.284, 0.320, 0.360),
    "fifo": (0.051, 0.119, 0.176, 0.248, 0.313, 0.348),
    "belady": (0.246, 0.348, 0.366, 0.366, 0.366, 0.366),
}
#: Worse by more than this than what was published, and the bench fails.
TOLERANCE = 0.005

Chain = Sequence[BlockKey]


def read_trace(path: Path) -> list[list[BlockKey]]:
    lines = path.read_text().splitlines()
    return [
        [BlockKey(block.to_bytes(32, "big")) for block in dict.fromkeys(json.loads(line)["hash_ids"])] for line in lines
    ]


def ours(policy: str, capacity: int, requests: Sequence[Chain]) -> int:
    """Hits of a manager with one tier: match, use, load what is there, store what is not, touch at the end."""
    manager = BlockManager([NamedTier("host_dram", TierIndex(capacity, POLICIES[policy](capacity)))])
    hits = 0
    for chain in requests:
        run = manager.match(chain)
        hits += run
        manager.note_use(chain)
        sources = manager.lease(chain)
        targets = manager.reserve(chain[run:], chain[run - 1] if run else None)
        for target in targets:
            manager.commit(target)
        manager.release(sources)
        manager.touch(chain)
        manager.take_changes()
    return hits


def fifo(capacity: int, requests: Sequence[Chain]) -> int:
    cache: OrderedDict[BlockKey, None] = OrderedDict()
    hits = 0
    for chain in requests:
        hits += next((place for place, key in enumerate(chain) if key not in cache), len(chain))
        for key in reversed(chain):
            cache.setdefault(key)
            if len(cache) > capacity:
                cache.popitem(last=False)
    return hits


def belady(capacity: int, requests: Sequence[Chain]) -> int:
    """Evicts what is used furthest in the future, of one request its tail first."""
    never = len(requests)
    next_use: dict[BlockKey, int] = {}
    uses: list[dict[BlockKey, int]] = []
    for number in range(never - 1, -1, -1):
        uses.append({key: next_use.get(key, never) for key in requests[number]})
        next_use.update(dict.fromkeys(requests[number], number))
    cache: dict[BlockKey, tuple[int, int]] = {}
    order: list[tuple[int, int, BlockKey]] = []
    hits = 0
    for chain, later in zip(requests, reversed(uses), strict=True):
        hits += next((place for place, key in enumerate(chain) if key not in cache), len(chain))
        for place, key in enumerate(chain):
            cache[key] = (-later[key], -place)
            heapq.heappush(order, (*cache[key], key))
        while len(cache) > capacity:
            *due, key = heapq.heappop(order)
            if cache.get(key) == tuple(due):
                del cache[key]
    return hits


def hit_rates(policy: str, unique: int, requests: Sequence[Chain]) -> list[float]:
    accesses = sum(map(len, requests))
    replay = {"fifo": fifo, "belady": belady}.get(policy)
    rates = []
    for share in SHARES:
        capacity = int(unique * share)
        rates.append((replay(capacity, requests) if replay else ours(policy, capacity, requests)) / accesses)
    return rates


def main(arguments: list[str]) -> int:
    """Prints the table; returns 1 when a policy of ours is worse than what was published for it."""
    parser = argparse.ArgumentParser(prog="benchmarks eviction")
    parser.add_argument("--traces", metavar="DIR", default=os.environ.get("DYNAMO_TRACES"), help=f"folder of {TRACE}")
    folder = parser.parse_args(arguments).traces
    path = Path(folder or ".") / TRACE
    if not path.is_file():
        print(f"eviction: not run, there is no {path}; name its folder with --traces DIR or DYNAMO_TRACES")
        return 0 if folder is None else 2
    requests = read_trace(path)
    counts: defaultdict[BlockKey, int] = defaultdict(int)
    for chain in requests:
        for key in chain:
            counts[key] += 1
    accesses = sum(counts.values())
    ideal = (accesses - len(counts)) / accesses
    print(f"{TRACE}: {len(requests)} requests, {accesses} accesses, {len(counts)} blocks, at most {ideal:.3f} hits")
    print(f"{'cache, share of blocks':<24}" + "".join(f"{share:>8.0%}" for share in SHARES) + f"{'CPU us/access':>15}")
    is_worse = False
    for policy, published in PUBLISHED.items():
        started = time.process_time()
        rates = hit_rates(policy, len(counts), requests)
        each = (time.process_time() - started) / len(SHARES) / accesses * 1e6
        print(f"{policy:<24}" + "".join(f"{rate:>8.3f}" for rate in rates) + f"{each:>15.2f}", flush=True)
        print(f"{'  published':<24}" + "".join(f"{rate:>8.3f}" for rate in published))
        is_worse |= policy in POLICIES and any(
            rate < other - TOLERANCE for rate, other in zip(rates, published, strict=True)
        )
    print("our policies are " + ("WORSE than published" if is_worse else "as good as published"))
    return int(is_worse)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
