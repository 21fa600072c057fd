"""Every kind of store that the conformance suite runs on. A new tier adds one factory here and nothing else."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dynamo_connectors.blocks import Namespace
from dynamo_connectors.tiers.base import TierStore
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.tiers.nvme import NvmeStore

NAMESPACE = Namespace(
    engine="test", model="m", revision="r", dtype="bfloat16", layout_fingerprint="f", block_size_tokens=16
)

#: Makes a store of (capacity_blocks, row_bytes) that lives, if it needs a place, under the directory.
Factory = Callable[[Path, int, int], TierStore]


def dram(directory: Path, capacity_blocks: int, row_bytes: int) -> TierStore:
    return DramStore(capacity_blocks, row_bytes)


def nvme(directory: Path, capacity_blocks: int, row_bytes: int) -> TierStore:
    return NvmeStore(directory, capacity_blocks, row_bytes, NAMESPACE)


def nvme_buffered(directory: Path, capacity_blocks: int, row_bytes: int) -> TierStore:
    """The same through the page cache, whatever the file system takes; `test_nvme_slab` lets one refuse O_DIRECT."""
    store = NvmeStore(directory, capacity_blocks, row_bytes, NAMESPACE)
    fcntl.fcntl(store._fd, fcntl.F_SETFL, fcntl.fcntl(store._fd, fcntl.F_GETFL) & ~os.O_DIRECT)
    return store


def nvme_volatile(directory: Path, capacity_blocks: int, row_bytes: int) -> TierStore:
    return NvmeStore(directory, capacity_blocks, row_bytes, NAMESPACE, persistent=False)


FACTORIES: dict[str, Factory] = {
    "dram": dram,
    "nvme": nvme,
    "nvme_buffered": nvme_buffered,
    "nvme_volatile": nvme_volatile,
}
#: Suffixes of the files that a closed store leaves for the next engine.
KEPT_FILES = {"nvme": {".slab", ".log"}, "nvme_buffered": {".slab", ".log"}}

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def mounted(kind: str, directory: Path, options: str = "") -> Iterator[Path]:
    """A file system of its own under `directory`; the test is skipped where this user may not mount."""
    if _libc.mount(kind.encode(), os.fsencode(directory), kind.encode(), 0, options.encode()) != 0:
        pytest.skip(f"cannot mount {kind}: {os.strerror(ctypes.get_errno())}")
    try:
        yield directory
    finally:
        assert _libc.umount2(os.fsencode(directory), 2) == 0, os.strerror(ctypes.get_errno())
