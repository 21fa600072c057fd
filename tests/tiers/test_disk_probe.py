"""Measuring a slab leaves it as it was: what it held is found and proven, and nothing else appears in it."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from dynamo_connectors.blocks import BlockKey, Namespace
from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers import disk_probe
from dynamo_connectors.tiers.disk_probe import read_rate
from dynamo_connectors.tiers.nvme import NvmeStore

SPACE = Namespace("test", "m", "r", "d", "l", 16)
PATIENT = 30.0


@pytest.mark.parametrize(("blocks", "row_bytes"), [(1, 100), (3, 8192), (300, 70_000), (40, 2 << 20)])
def test_a_fresh_slab_is_measured_and_stays_empty(blocks: int, row_bytes: int, tmp_path: Path) -> None:
    store = NvmeStore(tmp_path, blocks, row_bytes, SPACE)
    size = store.path.stat().st_size
    rate = read_rate(store, PATIENT)
    assert rate is not None
    assert rate > 0
    assert store.path.stat().st_size == size
    with pytest.raises(StoreError):
        store.read(0, BlockKey(b"key"), memoryview(bytearray(row_bytes)))
    store.write(0, BlockKey(b"key"), memoryview(bytes([7]) * row_bytes))
    into = memoryview(bytearray(row_bytes))
    store.read(0, BlockKey(b"key"), into)
    assert set(into) == {7}
    store.close()
    heir = NvmeStore(tmp_path, blocks, row_bytes, SPACE)
    assert list(heir.recovered) == [(0, BlockKey(b"key"))]
    heir.close()


def test_what_an_earlier_engine_left_is_read_and_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = NvmeStore(tmp_path, 20, 70_000, SPACE)
    for slot in range(20):
        store.write(slot, BlockKey(b"%d" % slot), memoryview(bytes([slot]) * 70_000))
    store.close()
    heir = NvmeStore(tmp_path, 20, 70_000, SPACE)
    written: list[int] = []
    monkeypatch.setattr(os, "pwritev", lambda *arguments: written.append(1))
    assert read_rate(heir, PATIENT) is not None
    assert not written
    into = memoryview(bytearray(70_000))
    for slot in range(20):
        heir.read(slot, BlockKey(b"%d" % slot), into)
        assert set(into) == {slot}
    heir.close()


@pytest.mark.parametrize("call", ["preadv", "pwritev", "open"])
def test_a_disk_that_fails_gives_no_rate_and_no_error(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = NvmeStore(tmp_path, 4, 8192, SPACE)

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(disk_probe.os, call, fail)
        assert read_rate(store, PATIENT) is None
    store.close()


def test_a_disk_that_hangs_does_not_hold_up_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, release, real = NvmeStore(tmp_path, 64, 1 << 20, SPACE), threading.Event(), os.preadv

    def hang(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        assert release.wait(60)
        return real(fd, buffers, offset)

    monkeypatch.setattr(disk_probe.os, "preadv", hang)
    assert read_rate(store, 0.2) is None
    release.set()
    store.close()


def test_a_machine_that_gives_no_more_threads_or_memory_gives_no_rate_and_keeps_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, start, asked = NvmeStore(tmp_path, 3, 8192, SPACE), threading.Thread.start, [0]

    def start_two(thread: threading.Thread) -> None:
        asked[0] += 1
        if asked[0] > 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    def no_memory(*_: object) -> None:
        raise OSError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start_two)
        assert read_rate(store, PATIENT) is None
    assert not [each for each in threading.enumerate() if each.name == "kvbm-disk-probe"]
    with monkeypatch.context() as patched:
        patched.setattr(disk_probe.mmap, "mmap", no_memory)
        assert read_rate(store, PATIENT) is None
    store.close()
