"""Memory of an index of 1 M blocks, and time of its operations on a prompt of 128k tokens (8,192 blocks).

    python -m benchmarks index [--blocks N]

The floor for a lookup is a plain dict of as many keys, asked for the same keys. Budgets: 250 bytes per block, keys
included, and 2 ms per lookup. A lookup is the median of many, each of other blocks, so that no cache is warm;
times are CPU time of the thread, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import takewhile

from dynamo_connectors.block_manager import BlockManager, NamedTier
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.eviction import POLICIES
from dynamo_connectors.tiers.index import TierIndex

PROMPT_BLOCKS = 8192
MOST_BYTES, MOST_SECONDS = 250, 0.002
ROUNDS = 30


def new_keys(count: int, seed: int) -> list[BlockKey]:
    source = random.Random(seed)
    return [BlockKey(source.randbytes(32)) for _ in range(count)]


def filled(policy: str, capacity: int, blocks: int) -> TierIndex:
    """An index whose keys belong to nobody else, as when their requests have ended. Every other block is used twice."""
    source = random.Random(1)
    index = TierIndex(capacity, POLICIES[policy](capacity))
    for number in range(blocks):
        key = BlockKey(source.randbytes(32))
        slot = index.reserve(key)
        assert slot is not None
        index.commit(slot)
        if number % 2:
            index.use_all([key])
        index.take_evicted()
    return index


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def memory(policy: str, capacity: int, blocks: int) -> tuple[float, float]:
    """Bytes per slot: what Python asked for, and what the process grew by."""
    gc.collect()
    before = resident_bytes()
    index = filled(policy, capacity, blocks)
    grown = resident_bytes() - before
    del index
    gc.collect()
    tracemalloc.start()
    index = filled(policy, capacity, blocks)
    asked, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del index
    return asked / capacity, grown / capacity


def stored(blocks: int, tier_of: Callable[[int], int]) -> tuple[BlockManager, list[BlockKey]]:
    """Three tiers, block i in tier `tier_of(i)` alone."""
    indexes = [TierIndex(blocks) for _ in range(3)]
    keys = new_keys(blocks, seed=2)
    for place, key in enumerate(keys):
        indexes[tier_of(place)].restore(place, key)
    names = ("host_dram", "nvme_ssd", "far")
    tiers = [NamedTier(name, index) for name, index in zip(names, indexes, strict=True)]
    return BlockManager(tiers, {"nvme_ssd": 2, "far": 2}), keys


def seconds_each(call: Callable[[Sequence[BlockKey]], object], keys: Sequence[BlockKey]) -> float:
    prompts = len(keys) // PROMPT_BLOCKS
    taken = []
    for number in range(min(ROUNDS, prompts)):
        prompt = keys[number * PROMPT_BLOCKS : (number + 1) * PROMPT_BLOCKS]
        started = time.thread_time()
        call(prompt)
        taken.append(time.thread_time() - started)
    return statistics.median(taken)


def dict_seconds(blocks: int) -> float:
    keys = new_keys(blocks, seed=2)
    known = dict.fromkeys(keys, 1)
    return seconds_each(lambda prompt: sum(1 for _ in takewhile(known.__contains__, prompt)), keys)


def print_times(blocks: int) -> float:
    """Returns the slowest lookup."""
    print(f"{'floor: a dict, key by key':<44}{dict_seconds(blocks) * 1e3:>8.2f} ms")
    slowest = 0.0
    layouts: dict[str, Callable[[int], int]] = {
        "all in the first tier": lambda place: 0,
        "all in the last of three": lambda place: 2,
        "a new tier every 16 blocks": lambda place: place // 16 % 3,
    }
    for name, tier_of in layouts.items():
        manager, keys = stored(blocks, tier_of)
        taken = seconds_each(manager.match, keys)
        slowest = max(slowest, taken)
        print(f"{'match, ' + name:<44}{taken * 1e3:>8.2f} ms")
    manager, keys = stored(blocks, lambda place: 0)
    print(f"{'note_use':<44}{seconds_each(manager.note_use, keys) * 1e3:>8.2f} ms")
    print(f"{'lease and release':<44}{seconds_each(lambda k: manager.release(manager.lease(k)), keys) * 1e3:>8.2f} ms")
    print(f"{'touch':<44}{seconds_each(manager.touch, keys) * 1e3:>8.2f} ms")
    fresh = new_keys(PROMPT_BLOCKS * ROUNDS, seed=3)
    print(f"{'reserve and commit, evicting':<44}{seconds_each(lambda k: store(manager, k), fresh) * 1e3:>8.2f} ms")
    return slowest


def store(manager: BlockManager, keys: Sequence[BlockKey]) -> None:
    for target in manager.reserve(keys):
        manager.commit(target)
    manager.take_changes()


def main(arguments: list[str]) -> int:
    """Returns 1 when a policy or a lookup is over its budget."""
    parser = argparse.ArgumentParser(prog="benchmarks index")
    parser.add_argument("--blocks", type=int, default=1_000_000)
    blocks = max(parser.parse_args(arguments).blocks, PROMPT_BLOCKS)
    print(f"{blocks} blocks, Python {sys.version.split()[0]}")
    print(f"{'bytes per block':<44}{'asked':>8}{'resident':>10}")
    most_asked = 0.0
    forms = (("lru", "lru", 1), ("lru, twice as many gone", "lru", 3), ("arc, as many ghosts as blocks", "arc", 3))
    for name, policy, factor in forms:
        asked, resident = memory(policy, blocks, factor * blocks)
        most_asked = max(most_asked, asked)
        print(f"{name:<44}{asked:>8.0f}{resident:>10.0f}")
    slowest = print_times(blocks)
    is_over = most_asked > MOST_BYTES or slowest > MOST_SECONDS
    print(f"{'OVER' if is_over else 'within'} the budgets of {MOST_BYTES} bytes and {MOST_SECONDS * 1e3:g} ms a lookup")
    return int(is_over)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
