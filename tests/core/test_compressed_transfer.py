"""Compressed rows through the real transfer engine and the real disk: bounds kept, kinds never mixed, damage a miss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dynamo_kernels import BlockView
from dynamo_kernels.compression import Codec, Compression, HeadLayout

from dynamo_connectors.blocks import Namespace
from dynamo_connectors.config import HOST_DRAM, NVME_SSD
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.tiers.nvme import NvmeStore, slot_offset
from dynamo_connectors.transfer import Stores, TransferEngine
from tests.core.test_transfer import Rig, keys

HEADS, TOKENS, WIDTH, LAYERS, BLOCKS = 2, 8, 16, 3, 24
LAYOUT = HeadLayout(torch.float32, (2, TOKENS, HEADS, WIDTH), (0, 2))
RAW = Namespace("test", "m", "r", "float32", "l", TOKENS)


def codec_of(kind: Compression) -> Codec:
    return Codec(kind, (LAYOUT,) * LAYERS)


def space_of(kind: Compression | None) -> Namespace:
    return RAW if kind is None else replace(RAW, dtype=f"float32/{kind.value}")


def make_rig(folder: Path, kind: Compression | None) -> Rig:
    hbm = torch.randn((LAYERS, BLOCKS, LAYOUT.elements), generator=torch.Generator().manual_seed(5))
    codec = None if kind is None else codec_of(kind)
    row_bytes = LAYERS * LAYOUT.page_bytes if codec is None else codec.row_bytes
    dram, disk = DramStore(BLOCKS, row_bytes), NvmeStore(folder, BLOCKS, row_bytes, space_of(kind))
    view = BlockView.of_pages(list(hbm.unbind(0)), [LAYOUT.page_bytes] * LAYERS)
    return Rig(TransferEngine(view, Stores(dram, disk, codec=codec)), hbm, dram, disk)


def within_bound(rig: Rig, block: int, was: torch.Tensor, kind: Compression) -> bool:
    """The bound of `dynamo_kernels.compression`, with each (layer, kind, head)'s own largest value."""
    there = was.reshape(LAYERS, 2, TOKENS, HEADS, WIDTH).double()
    here = rig.hbm[:, block].reshape(LAYERS, 2, TOKENS, HEADS, WIDTH).double()
    largest = there.abs().amax(dim=(2, 4), keepdim=True)
    fp8 = torch.maximum(there.abs() / 16, largest / 448 / 1024)
    limit = fp8 if kind is Compression.FP8 else largest / 254
    return bool(((there - here).abs() <= limit * (1 + 2.0**-20)).all())


@pytest.mark.parametrize("kind", Compression)
def test_blocks_come_back_within_the_bound_from_every_tier_and_alike_from_all(
    kind: Compression, tmp_path: Path
) -> None:
    rig, names, slots = make_rig(tmp_path, kind), keys(8), list(range(8))
    before = rig.hbm.clone()
    stored = rig.store(names, slots, slots)
    assert [moved.num_bytes for moved in stored.moved] == [8 * codec_of(kind).row_bytes]
    assert not rig.offload(names, slots, slots).failed
    assert not rig.load(names, HOST_DRAM, slots, list(range(8, 16))).failed
    assert not rig.load(names, NVME_SSD, slots, list(range(16, 24))).failed
    for block in range(8):
        assert within_bound(rig, 8 + block, before[:, block], kind)
    assert torch.equal(rig.hbm[:, 8:16], rig.hbm[:, 16:24]), "the disk holds other bytes than host memory"
    assert torch.equal(rig.hbm[:, :8], before[:, :8])
    # Up from the disk into host memory, and from there: the same once more.
    assert not rig.prefetch(names, slots, list(range(8, 16))).failed
    assert not rig.load(names, HOST_DRAM, list(range(8, 16)), list(range(16, 24))).failed
    assert torch.equal(rig.hbm[:, 8:16], rig.hbm[:, 16:24])
    rig.engine.close()


@pytest.mark.parametrize("kind", Compression)
def test_damaged_compressed_bytes_are_a_miss_like_any_others(kind: Compression, tmp_path: Path) -> None:
    rig, names = make_rig(tmp_path, kind), keys(2)
    rig.store(names, [0, 1], [0, 1])
    rig.offload(names, [0, 1], [0, 1])
    with rig.disk.path.open("r+b") as file:
        file.seek(slot_offset(1, rig.disk.row_bytes) + 5000)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    before = rig.hbm.clone()
    report = rig.load(names, NVME_SSD, [0, 1], [8, 9])
    assert dict(report.failed) == {names[1]: "bad_checksum"}
    assert torch.equal(rig.hbm[:, 9], before[:, 9])
    alone = rig.load(names[1:], NVME_SSD, [1], [9])
    assert dict(alone.failed) == {names[1]: "bad_checksum"}, "a load of which nothing is left"
    rig.dram.set_key(0, None)
    assert dict(rig.load(names[:1], HOST_DRAM, [0], [9]).failed) == {names[0]: "wrong_key"}
    rig.engine.close()


@pytest.mark.parametrize("first", [None, *Compression])
@pytest.mark.parametrize("second", [None, *Compression])
def test_a_slab_of_another_kind_is_never_read(
    first: Compression | None, second: Compression | None, tmp_path: Path
) -> None:
    rig, names, slots = make_rig(tmp_path, first), keys(4), [0, 1, 2, 3]
    rig.store(names, slots, slots)
    rig.offload(names, slots, slots)
    rig.engine.close()
    heir = make_rig(tmp_path, second)
    before = heir.hbm.clone()
    assert len(heir.disk.recovered) == (4 if first is second else 0)
    report = heir.load(names, NVME_SSD, slots, [8, 9, 10, 11])
    if first is second:
        assert not report.failed
    else:
        assert dict(report.failed) == dict.fromkeys(names, "bad_header")
        assert torch.equal(heir.hbm, before)
    assert len(list(tmp_path.glob("*.slab"))) == (1 if first is second else 2)
    heir.engine.close()


def test_a_slab_of_another_kind_under_its_name_is_emptied_and_not_read(tmp_path: Path) -> None:
    """Somebody has renamed it: its superblock says what it is. FP8 and INT8 rows have the same size."""
    rig, names, slots = make_rig(tmp_path, Compression.FP8), keys(4), [0, 1, 2, 3]
    rig.store(names, slots, slots)
    rig.offload(names, slots, slots)
    rig.engine.close()
    own = make_rig(tmp_path, Compression.INT8)
    wanted, given = own.disk.path, rig.disk.path
    own.engine.close()
    for suffix in (".slab", ".log"):
        given.with_suffix(suffix).replace(wanted.with_suffix(suffix))
    heir = make_rig(tmp_path, Compression.INT8)
    assert not heir.disk.recovered
    assert set(heir.load(names, NVME_SSD, slots, [8, 9, 10, 11]).failed) == set(names)
    heir.engine.close()
