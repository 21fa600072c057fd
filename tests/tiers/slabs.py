"""What the tests of a slab's second life share: blocks whose bytes follow from their key, and an engine that dies."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

from dynamo_connectors.blocks import BlockKey, Namespace
from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers.nvme import NvmeStore
from tests.tiers.factories import NAMESPACE

ROW = 12_288
CAPACITY = 16


def key_of(number: int) -> BlockKey:
    return BlockKey(f"block-{number}".encode().ljust(32, b"."))


def bytes_of(key: BlockKey) -> memoryview:
    return memoryview(bytearray(random.Random(bytes(key)).randbytes(ROW)))


def make(directory: Path, namespace: Namespace = NAMESPACE, capacity: int = CAPACITY) -> NvmeStore:
    return NvmeStore(directory, capacity, ROW, namespace)


def fill(store: NvmeStore, numbers: range) -> None:
    """Block n goes to slot n modulo the capacity."""
    for number in numbers:
        key = key_of(number)
        store.write(number % store.capacity_blocks, key, bytes_of(key))


def read_all(store: NvmeStore) -> Counter[str]:
    """Reads everything that was found again: how many were "right", and the reasons of the others. Wrong bytes fail."""
    outcomes: Counter[str] = Counter()
    into = memoryview(bytearray(ROW))
    for slot, key in store.recovered:
        try:
            store.read(slot, key, into)
        except StoreError as error:
            outcomes[error.reason] += 1
        else:
            assert into == bytes_of(key), f"slot {slot}: wrong bytes"
            outcomes["right"] += 1
    return outcomes


def run_until_killed(directory: Path, program: str) -> None:
    """Runs `program` with `store` open; it must end by SIGKILL, from itself (`die()`) or through its own timer."""
    prelude = (
        "import os, signal, sys, threading, time\n"
        "from pathlib import Path\n"
        "from tests.tiers.slabs import *\n"
        "from dynamo_connectors.tiers import index_log, nvme\n"
        "def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "store = make(Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", prelude + program, str(directory)]
    ended = subprocess.run(command, check=False, timeout=120, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    assert ended.returncode == -signal.SIGKILL, ended
