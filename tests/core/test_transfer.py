"""The transfer engine on real threads and real stores: every job is reported once, and only true bytes are reported."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from dynamo_kernels import BlockView, ComputeFence

from dynamo_connectors.blocks import BlockKey, Namespace
from dynamo_connectors.jobs import (
    DISK_TIER,
    DRAM_TIER,
    JobReport,
    LoadItem,
    LoadJob,
    SpillItem,
    SpillJob,
    StoreItem,
    StoreJob,
)
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.tiers.nvme import NvmeStore
from dynamo_connectors.transfer import Job, Stores, TransferEngine

PAGES, BLOCKS, PAGE_BYTES = 3, 64, 72
ROW_BYTES = PAGES * PAGE_BYTES
SPACE = Namespace("test", "m", "r", "d", "l", 16)


def keys(count: int) -> list[BlockKey]:
    return [BlockKey(f"key-{index}".encode()) for index in range(count)]


@dataclass
class Rig:
    engine: TransferEngine
    hbm: torch.Tensor
    dram: DramStore
    disk: NvmeStore

    def run(self, job: Job) -> JobReport:
        self.engine.submit(job, ComputeFence(torch.device("cpu")))
        reports = []
        deadline = time.monotonic() + 20
        while not reports:
            assert time.monotonic() < deadline, "the job was never reported"
            reports = self.engine.poll(0.05)
        (report,) = reports
        assert report.job_id == job.job_id
        return report

    def store(self, names: list[BlockKey], blocks: list[int], slots: list[int]) -> JobReport:
        return self.run(StoreJob(1, tuple(map(StoreItem, names, blocks, slots))))

    def load(self, names: list[BlockKey], tier: int, slots: list[int], blocks: list[int]) -> JobReport:
        tiers = [tier] * len(names)
        return self.run(LoadJob(2, "r", tuple(map(LoadItem, names, tiers, slots, blocks))))

    def spill(self, names: list[BlockKey], sources: list[int], targets: list[int]) -> JobReport:
        return self.run(SpillJob(3, tuple(map(SpillItem, names, sources, targets))))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    torch.manual_seed(1)
    hbm = torch.randint(0, 256, (PAGES, BLOCKS, PAGE_BYTES), dtype=torch.uint8)
    dram = DramStore(40, ROW_BYTES)
    disk = NvmeStore(tmp_path, 40, ROW_BYTES, SPACE)
    view = BlockView.of_pages(list(hbm.unbind(0)), [PAGE_BYTES] * PAGES)
    engine = TransferEngine(view, Stores(dram, disk))
    yield Rig(engine, hbm, dram, disk)
    engine.close()
    assert not list(tmp_path.iterdir())


def test_bytes_survive_the_way_down_to_disk_and_up_again(rig: Rig) -> None:
    names, blocks, slots = keys(40), list(range(40)), list(range(39, -1, -1))
    expected = rig.hbm[:, :40].clone()
    assert not rig.store(names, blocks, slots).failed
    assert not rig.spill(names, slots, blocks).failed
    rig.hbm.zero_()
    assert not rig.load(names[:20], DRAM_TIER, slots[:20], blocks[:20]).failed
    assert not rig.load(names[20:], DISK_TIER, blocks[20:], blocks[20:]).failed
    assert torch.equal(rig.hbm[:, :40], expected)


def test_a_slot_that_holds_another_block_fails_that_block_only(rig: Rig) -> None:
    names = keys(3)
    rig.store(names, [0, 1, 2], [0, 1, 2])
    before = rig.hbm.clone()
    report = rig.load([names[0], names[2], names[1]], DRAM_TIER, [0, 1, 2], [10, 11, 12])
    assert dict(report.failed) == {names[2]: "wrong_key", names[1]: "wrong_key"}
    assert torch.equal(rig.hbm[:, 10], before[:, 0])
    assert torch.equal(rig.hbm[:, 11:13], before[:, 11:13])


def test_a_slot_being_refilled_cannot_be_read_as_the_old_block(rig: Rig) -> None:
    (name,) = keys(1)
    rig.store([name], [0], [0])
    rig.dram.set_key(0, None)
    assert dict(rig.load([name], DRAM_TIER, [0], [5]).failed) == {name: "wrong_key"}
    assert dict(rig.spill([name], [0], [0]).failed) == {name: "wrong_key"}


def test_damage_on_disk_fails_that_block_only(rig: Rig) -> None:
    names = keys(4)
    rig.store(names, [0, 1, 2, 3], [0, 1, 2, 3])
    rig.spill(names, [0, 1, 2, 3], [0, 1, 2, 3])
    with rig.disk.path.open("r+b") as file:
        file.seek(2 * 8192 + 4096 + 5)
        byte = file.read(1)[0]
        file.seek(2 * 8192 + 4096 + 5)
        file.write(bytes([byte ^ 1]))
    expected = rig.hbm[:, :4].clone()
    report = rig.load(names, DISK_TIER, [0, 1, 2, 3], [10, 11, 12, 13])
    assert dict(report.failed) == {names[2]: "bad_checksum"}
    assert torch.equal(rig.hbm[:, [10, 11, 13]], expected[:, [0, 1, 3]])


def test_a_job_that_cannot_be_done_is_reported_as_failed_and_touches_nothing(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    names = keys(2)
    before = rig.hbm.clone()
    rig.store(names, [0, 1], [0, 1])
    report = rig.load(names, DRAM_TIER, [0, 1], [BLOCKS, 3])
    assert dict(report.failed) == dict.fromkeys(names, "internal_error")
    assert torch.equal(rig.hbm, before)
    assert "treated as a miss" in caplog.text
    assert not rig.load(names, DRAM_TIER, [0, 1], [8, 9]).failed


def test_closing_twice_and_with_work_waiting_is_fine(rig: Rig) -> None:
    for job_id in range(100):
        rig.engine.submit(StoreJob(job_id, (StoreItem(keys(1)[0], 0, 0),)), ComputeFence(torch.device("cpu")))
    rig.engine.close()
    rig.engine.close()
