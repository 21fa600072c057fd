"""The transfer engine on real threads and real stores: every job is reported once, and only true bytes are reported."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from dynamo_kernels import BlockView, ComputeFence

from dynamo_connectors import transfer
from dynamo_connectors.blocks import BlockKey, Namespace
from dynamo_connectors.config import HOST_DRAM, NVME_SSD, OBJECT_STORE
from dynamo_connectors.jobs import JobReport, LoadItem, LoadJob, MoveItem, MoveJob, StoreItem, StoreJob
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.tiers.nvme import NvmeStore, slot_offset
from dynamo_connectors.tiers.nvme_lanes import NvmeTier
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

    def start(self, job: Job) -> None:
        self.engine.submit(job, ComputeFence(torch.device("cpu")))

    def reports(self, count: int) -> dict[int, JobReport]:
        found: list[JobReport] = []
        deadline = time.monotonic() + 20
        while len(found) < count:
            assert time.monotonic() < deadline, "a job was never reported"
            found += self.engine.poll(0.05)
        assert len({report.job_id for report in found}) == len(found) == count, "a job was reported twice"
        return {report.job_id: report for report in found}

    def run(self, job: Job) -> JobReport:
        self.start(job)
        return self.reports(1)[job.job_id]

    def store(self, names: list[BlockKey], blocks: list[int], slots: list[int]) -> JobReport:
        return self.run(StoreJob(1, tuple(map(StoreItem, names, blocks, slots))))

    def load(self, names: list[BlockKey], tier: str, slots: list[int], blocks: list[int]) -> JobReport:
        return self.run(load_job(2, names, tier, slots, blocks))

    def offload(self, names: list[BlockKey], sources: list[int], targets: list[int]) -> JobReport:
        return self.run(MoveJob(3, HOST_DRAM, NVME_SSD, tuple(map(MoveItem, names, sources, targets))))

    def prefetch(self, names: list[BlockKey], sources: list[int], targets: list[int]) -> JobReport:
        return self.run(MoveJob(4, NVME_SSD, HOST_DRAM, tuple(map(MoveItem, names, sources, targets))))


def load_job(job_id: int, names: list[BlockKey], tier: str, slots: list[int], blocks: list[int]) -> LoadJob:
    return LoadJob(job_id, "r", tuple(map(LoadItem, names, [tier] * len(names), slots, blocks)))


@pytest.fixture(params=[72, 4096], ids=["odd rows", "rows of whole pages"])
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    torch.manual_seed(1)
    page_bytes = request.param
    hbm = torch.randint(0, 256, (PAGES, BLOCKS, page_bytes), dtype=torch.uint8)
    dram = DramStore(40, PAGES * page_bytes)
    disk = NvmeStore(tmp_path, 40, PAGES * page_bytes, SPACE)
    view = BlockView.of_pages(list(hbm.unbind(0)), [page_bytes] * PAGES)
    engine = TransferEngine(view, Stores(dram, disk))
    yield Rig(engine, hbm, dram, disk)
    engine.close()
    staging = engine._below[NVME_SSD].staging
    assert len(staging._free) == staging.store.capacity_blocks, "a staging row was lost"
    assert engine._unreported == 0, "a job was never reported"


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvbm-")]


@dataclass
class Hang:
    """Disk requests that wait until `release`."""

    started: threading.Event
    release: threading.Event


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Hang]:
    hung, real = Hang(threading.Event(), threading.Event()), getattr(os, request.param)

    def call(*arguments: object) -> object:
        hung.started.set()
        assert hung.release.wait(60)
        return real(*arguments)

    monkeypatch.setattr(os, request.param, call)
    yield hung
    hung.release.set()


def test_bytes_survive_the_way_down_to_disk_and_up_again(rig: Rig) -> None:
    names, blocks, slots = keys(40), list(range(40)), list(range(39, -1, -1))
    expected = rig.hbm[:, :40].clone()
    assert not rig.store(names, blocks, slots).failed
    assert not rig.offload(names, slots, blocks).failed
    rig.hbm.zero_()
    assert not rig.load(names[:20], HOST_DRAM, slots[:20], blocks[:20]).failed
    assert not rig.load(names[20:], NVME_SSD, blocks[20:], blocks[20:]).failed
    assert torch.equal(rig.hbm[:, :40], expected)


def test_bytes_come_back_from_disk_to_other_host_rows(rig: Rig) -> None:
    names, slots = keys(40), list(range(40))
    expected = rig.hbm[:, :40].clone()
    rig.store(names, slots, slots)
    rig.offload(names, slots, slots)
    elsewhere = slots[7:] + slots[:7]
    assert not rig.prefetch(names, slots, elsewhere).failed
    rig.hbm.zero_()
    assert not rig.load(names, HOST_DRAM, elsewhere, slots).failed
    assert torch.equal(rig.hbm[:, :40], expected)


def test_a_load_may_mix_tiers(rig: Rig) -> None:
    names, slots = keys(6), list(range(6))
    expected = rig.hbm[:, :6].clone()
    rig.store(names, slots, slots)
    rig.offload(names, slots, slots)
    tiers = [HOST_DRAM, NVME_SSD] * 3
    report = rig.run(LoadJob(2, "r", tuple(map(LoadItem, names, tiers, slots, range(10, 16)))))
    assert not report.failed
    assert torch.equal(rig.hbm[:, 10:16], expected)
    assert [(m.tier, m.num_bytes) for m in report.moved] == [
        (HOST_DRAM, 3 * rig.dram.row_bytes),
        (NVME_SSD, 3 * rig.dram.row_bytes),
    ]


def test_reports_say_what_moved(rig: Rig) -> None:
    names, slots = keys(4), list(range(4))
    row = rig.dram.row_bytes
    reports = [rig.store(names, slots, slots), rig.offload(names[:3], slots[:3], slots[:3])]
    reports += [rig.prefetch(names[:2], slots[:2], [20, 21]), rig.load(names[:1], NVME_SSD, [0], [30])]
    reports += [rig.load(names[:1], NVME_SSD, [3], [30])]
    assert [[(m.tier, m.num_bytes) for m in report.moved] for report in reports] == [
        [(HOST_DRAM, 4 * row)],
        [(NVME_SSD, 3 * row)],
        [(NVME_SSD, 2 * row)],
        [(NVME_SSD, row)],
        [(NVME_SSD, 0)],
    ]
    assert all(moved.seconds > 0 for report in reports for moved in report.moved)


def test_a_slot_that_holds_another_block_fails_that_block_only(rig: Rig) -> None:
    names = keys(3)
    rig.store(names, [0, 1, 2], [0, 1, 2])
    before = rig.hbm.clone()
    report = rig.load([names[0], names[2], names[1]], HOST_DRAM, [0, 1, 2], [10, 11, 12])
    assert dict(report.failed) == {names[2]: "wrong_key", names[1]: "wrong_key"}
    assert torch.equal(rig.hbm[:, 10], before[:, 0])
    assert torch.equal(rig.hbm[:, 11:13], before[:, 11:13])
    report = rig.offload([names[0], names[2]], [0, 1], [0, 1])
    assert dict(report.failed) == {names[2]: "wrong_key"}


def test_a_slot_being_refilled_cannot_be_read_as_the_old_block(rig: Rig) -> None:
    (name,) = keys(1)
    rig.store([name], [0], [0])
    rig.dram.set_key(0, None)
    assert dict(rig.load([name], HOST_DRAM, [0], [5]).failed) == {name: "wrong_key"}
    assert dict(rig.offload([name], [0], [0]).failed) == {name: "wrong_key"}


def damage(rig: Rig, slot: int) -> None:
    with rig.disk.path.open("r+b") as file:
        at = slot_offset(slot, rig.dram.row_bytes) + 4096 + 5
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
        os.fsync(file.fileno())


def test_damage_on_disk_fails_that_block_only(rig: Rig) -> None:
    names = keys(4)
    rig.store(names, [0, 1, 2, 3], [0, 1, 2, 3])
    rig.offload(names, [0, 1, 2, 3], [0, 1, 2, 3])
    damage(rig, 2)
    expected = rig.hbm[:, :4].clone()
    report = rig.load(names, NVME_SSD, [0, 1, 2, 3], [10, 11, 12, 13])
    assert dict(report.failed) == {names[2]: "bad_checksum"}
    assert torch.equal(rig.hbm[:, [10, 11, 13]], expected[:, [0, 1, 3]])
    assert dict(rig.prefetch(names, [0, 1, 2, 3], [5, 6, 7, 8]).failed) == {names[2]: "bad_checksum"}
    assert [rig.dram.holds(5 + at, name) for at, name in enumerate(names)] == [True, True, False, True]


def test_a_job_that_cannot_be_done_is_reported_as_failed_and_touches_nothing(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    names = keys(2)
    before = rig.hbm.clone()
    rig.store(names, [0, 1], [0, 1])
    report = rig.load(names, HOST_DRAM, [0, 1], [BLOCKS, 3])
    assert dict(report.failed) == dict.fromkeys(names, "internal_error")
    assert torch.equal(rig.hbm, before)
    assert "treated as a miss" in caplog.text
    assert not rig.load(names, HOST_DRAM, [0, 1], [8, 9]).failed
    report = rig.run(MoveJob(9, HOST_DRAM, OBJECT_STORE, (MoveItem(names[0], 0, 0),)))
    assert dict(report.failed) == {names[0]: "internal_error"}


def test_blocks_of_a_long_store_can_be_read_before_the_last_one_has_come(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_STORED_AT_A_TIME", 3)
    names, slots, there = keys(8), list(range(8)), []
    rig.dram.listen(
        lambda: there.append(sum(rig.dram.holds(slot, name) for name, slot in zip(names, slots, strict=True)))
    )
    assert not rig.store(names, slots, slots).failed
    assert there == [3, 6, 8]


class Killed(BaseException):
    """What no `except Exception` stops."""


@pytest.mark.parametrize("place", ["copy", "disk_read", "disk_write", "copy_after_disk"])
def test_a_thread_that_dies_costs_its_job_and_the_next_one_runs(
    rig: Rig, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, slots = keys(4), [0, 1, 2, 3]
    rig.store(names, slots, slots)
    rig.offload(names[:2], slots[:2], slots[:2])
    staging = rig.engine._below[NVME_SSD].staging
    jobs: dict[str, tuple[object, str, Callable[[], JobReport]]] = {
        "copy": (rig.engine._copy, "start_down", lambda: rig.store(names, slots, slots)),
        "disk_read": (rig.disk, "read_run", lambda: rig.load(names[:2], NVME_SSD, [0, 1], [8, 9])),
        "disk_write": (rig.disk, "write_run", lambda: rig.offload(names[2:], [2, 3], [2, 3])),
        "copy_after_disk": (staging.copy, "up", lambda: rig.load(names[:2], NVME_SSD, [0, 1], [8, 9])),
    }
    owner, name, job = jobs[place]

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, die)
        for _ in range(10):  # more often than there are threads
            report = job()
            assert report.failed
            assert set(report.failed.values()) == {"internal_error"}
    rig.store(names, slots, slots)
    assert not job().failed


def test_a_load_overtakes_offloads(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """All disk writers are held: loads from memory and from disk end all the same."""
    names, slots = keys(40), list(range(40))
    rig.store(names, slots, slots)
    rig.offload(names, slots, slots)
    release, real = threading.Event(), os.pwritev

    def slow(*arguments: object) -> object:
        assert release.wait(60)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwritev", slow)
    for number in range(30):
        rig.start(MoveJob(100 + number, HOST_DRAM, NVME_SSD, (MoveItem(names[number], number, number),)))
    assert not rig.load(names[30:], NVME_SSD, slots[30:], slots[30:]).failed
    assert not rig.load(names[:9], HOST_DRAM, slots[:9], list(range(50, 59))).failed
    release.set()
    assert not any(report.failed for report in rig.reports(30).values())


@pytest.mark.parametrize("hang", ["preadv"], indirect=True)
def test_a_disk_that_hangs_costs_its_loads_and_never_their_memory(
    rig: Rig, hang: Hang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NvmeTier, "deadline_seconds", 0.3)
    names, slots = keys(40), list(range(40))
    rig.store(names, slots, slots)
    rig.offload(names, slots, slots)
    before = rig.hbm.clone()
    for number in range(6):  # enough to want every staging row
        rig.start(load_job(number, names, NVME_SSD, slots, slots))
    assert hang.started.wait(20)
    rig.start(load_job(99, names[:3], HOST_DRAM, [0, 1, 2], [60, 61, 62]))
    reports = rig.reports(7)  # the disk still hangs
    assert not reports.pop(99).failed, "host memory waits for the disk"
    assert {reason for report in reports.values() for reason in report.failed.values()} == {"timeout"}
    assert all(len(report.failed) == 40 for report in reports.values())
    waits = [moved for report in reports.values() for moved in report.moved]
    assert [(wait.tier, wait.num_bytes) for wait in waits] == [(NVME_SSD, 0)] * 6
    assert all(wait.seconds >= 0.3 for wait in waits), "nobody hears how long the disk kept them waiting"
    assert torch.equal(rig.hbm[:, :60], before[:, :60])
    hang.release.set()  # late reads now land, in rows that nobody was given meanwhile
    monkeypatch.setattr(NvmeTier, "deadline_seconds", 30.0)
    rig.hbm.zero_()
    assert not rig.load(names, NVME_SSD, slots, slots).failed
    assert torch.equal(rig.hbm[:, :40], before[:, :40])


@pytest.mark.parametrize("hang", ["preadv", "pwritev"], indirect=True)
def test_closing_leaves_a_hung_disk_behind(
    rig: Rig, hang: Hang, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transfer, "_CLOSE_SECONDS", 0.5)
    names = keys(20)
    slots = list(range(20))
    rig.store(names, slots, slots)
    rig.start(MoveJob(5, HOST_DRAM, NVME_SSD, tuple(map(MoveItem, names, slots, slots))))
    rig.start(load_job(6, names, NVME_SSD, slots, slots))
    assert hang.started.wait(20)
    rig.engine.close()
    assert caplog.text.count("does not answer") == 1
    fd = rig.disk._fd
    assert fd >= 0, "the descriptor was closed under a request that still runs"
    hang.release.set()
    deadline = time.monotonic() + 20
    while rig.engine._unreported or rig.disk._fd >= 0 or our_threads():
        assert time.monotonic() < deadline, "something stayed behind for good"
        time.sleep(0.01)


def test_jobs_that_come_too_late_are_reported_too(rig: Rig) -> None:
    names = keys(2)
    rig.store(names, [0, 1], [0, 1])
    rig.engine.close()
    rig.start(StoreJob(1, (StoreItem(names[0], 0, 0),)))
    rig.start(load_job(2, names, HOST_DRAM, [0, 1], [0, 1]))
    rig.start(load_job(3, names, NVME_SSD, [0, 1], [0, 1]))
    rig.start(MoveJob(4, NVME_SSD, HOST_DRAM, (MoveItem(names[0], 0, 0),)))
    reports = rig.reports(4)
    assert all(report.failed for report in reports.values())
    assert {reason for n in (1, 2, 3) for reason in reports[n].failed.values()} == {"closed"}


def test_closing_twice_and_with_work_waiting_reports_all_of_it(rig: Rig) -> None:
    for job_id in range(100):
        rig.start(StoreJob(job_id, (StoreItem(keys(1)[0], 0, 0),)))
    rig.engine.close()
    rig.engine.close()
    assert len(rig.reports(100)) == 100


def test_what_was_offloaded_is_there_for_the_next_engine(rig: Rig, tmp_path: Path) -> None:
    names, slots = keys(30), list(range(30))
    expected = rig.hbm[:, :30].clone()
    rig.store(names, slots, slots)
    rig.offload(names, slots, slots)
    rig.engine.close()
    row = rig.disk.row_bytes
    dram, disk = DramStore(40, row), NvmeStore(tmp_path, 40, row, SPACE)
    assert sorted(slot for slot, _ in disk.recovered) == slots
    hbm = torch.zeros_like(rig.hbm)
    engine = TransferEngine(BlockView.of_pages(list(hbm.unbind(0)), [row // PAGES] * PAGES), Stores(dram, disk))
    heir = Rig(engine, hbm, dram, disk)
    found = {key: slot for slot, key in disk.recovered}
    assert not heir.load(names, NVME_SSD, [found[name] for name in names], slots).failed
    assert torch.equal(hbm[:, :30], expected)
    engine.close()
