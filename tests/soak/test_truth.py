"""The soak's eyes: a wrong float in a block is seen on disk and in the copy, a rounded one is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.tiers.nvme import NvmeStore
from soak.truth import compare_slabs, difference, load_rows, read_rows, save_rows, watch_variables
from tests.tiers.factories import NAMESPACE

FLOATS = 2048
KEYS = [BlockKey(bytes([number]) * 32) for number in range(3)]


def row_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).random(FLOATS, dtype=np.float32)


def written(folder: Path) -> Path:
    """A slab that holds a row of its own under each key, as a killed engine leaves it."""
    folder.mkdir()
    store = NvmeStore(folder, len(KEYS), FLOATS * 4, NAMESPACE)
    for number, key in enumerate(KEYS):
        store.write(number, key, memoryview(row_of(number)).cast("B"))
    store.close()
    return folder


def test_rows_on_disk_are_compared_and_survive_a_file(tmp_path: Path) -> None:
    slabs = written(tmp_path / "kv")
    rows = read_rows(slabs)
    assert rows.keys() == set(KEYS)
    save_rows(rows, tmp_path / "rows.npz")
    loaded = load_rows(tmp_path / "rows.npz")
    assert compare_slabs(loaded, slabs) == []
    loaded[KEYS[1]] = loaded[KEYS[1]] + np.float32(1e-6)
    assert compare_slabs(loaded, slabs) == []
    loaded[KEYS[1]][100:103] += np.float32(0.01)
    (line,) = compare_slabs(loaded, slabs)
    assert f"block {KEYS[1].hex()[:16]}: 3 of {FLOATS} floats differ, the first at 100" in line


def test_what_its_header_does_not_prove_is_not_compared(tmp_path: Path) -> None:
    slabs = written(tmp_path / "kv")
    rows = {key: row.copy() for key, row in read_rows(slabs).items()}
    (slab,) = slabs.glob("*.slab")
    with slab.open("r+b") as file:
        file.seek(slab.stat().st_size - 100)
        file.write(b"damage")
    assert read_rows(slabs).keys() == set(KEYS[:2])
    assert compare_slabs(rows, slabs) == []


def test_a_float_that_is_no_number_is_wrong() -> None:
    row = row_of(0)
    row[7] = np.nan
    assert difference({KEYS[0]: row_of(0)}, KEYS[0], row) is not None
    assert difference({}, KEYS[0], row) is None


STORE_AND_LOAD = """
import torch
from dynamo_kernels.block_view import BlockView
from dynamo_kernels.fence import ComputeFence
from dynamo_connectors.jobs import LoadItem, LoadJob, StoreItem, StoreJob
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.transfer import Stores, TransferEngine

hbm = torch.arange(4 * 512, dtype=torch.float32).reshape(4, 512)
engine = TransferEngine(BlockView.of_pages([hbm], [2048]), Stores(DramStore(3, 2048)))
fence = ComputeFence(torch.device("cpu"))
engine.submit(StoreJob(1, (StoreItem(b"right", 1, 0), StoreItem(b"wrong", 2, 1), StoreItem(b"other", 0, 2))), fence)
assert engine.poll(20)
engine.submit(LoadJob(2, "r", (LoadItem(b"right", "host_dram", 0, 3),)), fence)
assert engine.poll(20)
assert engine.run_ahead(LoadJob(3, "r", (LoadItem(b"wrong", "host_dram", 1, 3),)))
assert engine.poll(20)
engine.close()
"""


@pytest.mark.timeout(120)
def test_an_engine_under_watch_tells_each_copy(tmp_path: Path) -> None:
    right = np.arange(512, 1024, dtype=np.float32)
    save_rows({b"right": right, b"wrong": right}, tmp_path / "rows.npz")
    told = tmp_path / "told"
    env = {**os.environ, **watch_variables(tmp_path / "rows.npz", told)}
    subprocess.run([sys.executable, "-c", STORE_AND_LOAD], env=env, check=True, timeout=100)
    assert told.read_text().splitlines() == [
        "stored: right",
        f"stored, block {b'wrong'.hex()[:16]}: 512 of 512 floats differ, the first at 0",
        "stored: unknown",
        "loaded from host_dram: right",
        f"loaded from host_dram, block {b'wrong'.hex()[:16]}: 512 of 512 floats differ, the first at 0",
    ]
