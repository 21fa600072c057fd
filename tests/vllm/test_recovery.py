"""After a restart a block counts only where every worker has its share."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_connectors.blocks import BlockKey, Namespace
from dynamo_connectors.tiers.nvme import NvmeStore
from dynamo_connectors.vllm.lasting import LastingTiers
from dynamo_connectors.vllm.recovery import Find, Recovery, in_common

A, B, C = (BlockKey(name) for name in (b"a", b"b", b"c"))
DISK = "nvme_ssd"


def test_only_what_all_workers_found_under_the_same_slot_is_recovered() -> None:
    recovery = Recovery(2, [DISK])
    assert recovery.hear({DISK: Find(1, [(0, A), (2, B), (1, C)])}) == {}
    assert recovery.is_open(DISK)
    assert recovery.hear({DISK: Find(1, [(1, C), (3, B), (0, A)])}) == {DISK: [(0, A), (1, C)]}
    assert not recovery.is_open(DISK)


def test_a_worker_that_found_nothing_empties_the_tier() -> None:
    recovery = Recovery(3, [DISK])
    recovery.hear({DISK: Find(2, [(0, A)])})
    assert recovery.hear({DISK: Find(1, [])}) == {DISK: []}


def test_workers_may_speak_of_different_tiers_in_one_step() -> None:
    finds = in_common({DISK: Find(1, [(0, A)])}, {DISK: Find(1, [(0, A)]), "object_store": Find(1, [(0, B)])})
    assert finds == {DISK: Find(2, [(0, A)]), "object_store": Find(1, [(0, B)])}
    recovery = Recovery(2, [DISK, "object_store"])
    assert recovery.hear(finds) == {DISK: [(0, A)]}
    assert recovery.is_open("object_store")


def test_a_worker_that_speaks_twice_is_a_bug() -> None:
    recovery = Recovery(1, [DISK])
    recovery.hear({DISK: Find(1, [])})
    with pytest.raises(AssertionError, match="twice"):
        recovery.hear({DISK: Find(1, [])})


def test_what_a_disk_holds_is_told_once_and_not_kept_in_memory(tmp_path: Path) -> None:
    def open_disk() -> NvmeStore:
        return NvmeStore(tmp_path, 4, 512, Namespace("vllm", "tiny", "", "bf16", "layout", 16))

    disk = open_disk()
    disk.write(3, A, memoryview(bytes(512)))
    disk.close()
    disk = open_disk()
    lasting = LastingTiers(disk, None)
    assert lasting.take_finds() == {DISK: Find(1, [(3, A)])}
    assert lasting.take_finds() == {}
    assert not disk.recovered
    disk.close()
