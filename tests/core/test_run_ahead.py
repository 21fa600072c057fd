"""Loads that run ahead: in the engine's own order at once, reported when they have arrived, and never by guesswork."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dynamo_kernels.block_view import BlockView
from dynamo_kernels.fence import ComputeFence

from dynamo_connectors.config import HOST_DRAM, NVME_SSD
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.tiers.nvme import NvmeStore
from dynamo_connectors.transfer import Stores, TransferEngine
from tests.core.test_transfer import BLOCKS, PAGE_BYTES, PAGES, ROW_BYTES, SPACE, Rig, keys, load_job


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    torch.manual_seed(1)
    hbm = torch.randint(0, 256, (PAGES, BLOCKS, PAGE_BYTES), dtype=torch.uint8)
    dram, disk = DramStore(40, ROW_BYTES), NvmeStore(tmp_path, 40, ROW_BYTES, SPACE)
    engine = TransferEngine(BlockView.of_pages(list(hbm.unbind(0)), [PAGE_BYTES] * PAGES), Stores(dram, disk))
    yield Rig(engine, hbm, dram, disk)
    engine.close()
    assert engine._unreported == 0, "a job was never reported"


def test_a_load_that_runs_ahead_is_in_the_engines_own_order(rig: Rig) -> None:
    names = keys(3)
    rig.store(names, [0, 1, 2], [4, 5, 6])
    wanted = rig.hbm[:, :3].clone()
    assert rig.engine.run_ahead(load_job(2, names, HOST_DRAM, [4, 5, 6], [10, 11, 12]))
    assert torch.equal(rig.hbm[:, 10:13], wanted), "on the CPU that order is the order of calls"
    report = rig.reports(1)[2]
    assert not report.failed
    assert [(moved.tier, moved.num_bytes) for moved in report.moved] == [(HOST_DRAM, 3 * rig.dram.row_bytes)]


def test_what_may_fail_or_must_be_waited_for_does_not_run_ahead(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    names = keys(2)
    rig.store(names, [0, 1], [0, 1])
    rig.offload(names, [0, 1], [0, 1])
    before = rig.hbm.clone()
    assert not rig.engine.run_ahead(load_job(5, names, NVME_SSD, [0, 1], [10, 11]))
    assert not rig.engine.run_ahead(load_job(6, names[::-1], HOST_DRAM, [0, 1], [10, 11]))

    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(rig.engine._copy, "start_up", broken)
    assert not rig.engine.run_ahead(load_job(7, names, HOST_DRAM, [0, 1], [10, 11]))
    assert torch.equal(rig.hbm, before)
    assert not rig.engine.poll(0.05), "what did not start has no report"
    assert not rig.load(names, HOST_DRAM, [0, 1], [10, 11]).failed


def test_a_copy_that_would_wait_for_another_one_does_not_run_ahead(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    names = keys(1)
    rig.store(names, [0], [0])
    monkeypatch.setattr(rig.engine._copy, "start_up", lambda *_: False)
    assert not rig.engine.run_ahead(load_job(2, names, HOST_DRAM, [0], [10]))
    assert not rig.load(names, HOST_DRAM, [0], [10]).failed


def test_a_load_beside_the_step_is_there_when_it_was_joined(rig: Rig) -> None:
    names = keys(2)
    rig.store(names, [0, 1], [0, 1])
    wanted = rig.hbm[:, :2].clone()
    begun = ComputeFence(torch.device("cpu"))
    assert rig.engine.run_ahead(load_job(2, names, HOST_DRAM, [0, 1], [10, 11]), begun)
    rig.engine.join()
    assert torch.equal(rig.hbm[:, 10:12], wanted)
    assert not rig.reports(1)[2].failed


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_kernels.layered._GROUP_BYTES", 1)
    monkeypatch.setattr("dynamo_kernels.layered._GROUP_PARTS", 1)


@pytest.mark.usefixtures("_small")
def test_a_load_by_layers_is_there_part_by_part_and_reported_once(rig: Rig) -> None:
    rig.engine.prepare_layers()
    names = keys(2)
    rig.store(names, [0, 1], [0, 1])
    wanted = rig.hbm[:, :2].clone()
    begun = ComputeFence(torch.device("cpu"))
    assert rig.engine.run_ahead(load_job(2, names, HOST_DRAM, [0, 1], [10, 11]), begun, by_layers=True)
    assert rig.engine.layers.is_open
    rig.engine.join()
    assert rig.engine.layers.is_open, "what is waited for beside a step are other loads"
    for part in range(PAGES):
        rig.engine.layers.wait(part)
        assert torch.equal(rig.hbm[part, 10:12], wanted[part])
    rig.engine.layers.join()
    assert not rig.engine.layers.is_open
    assert not rig.reports(1)[2].failed


def test_a_load_too_small_for_layers_or_without_them_is_in_the_engines_own_order(rig: Rig) -> None:
    names = keys(1)
    rig.store(names, [0], [0])
    begun = ComputeFence(torch.device("cpu"))
    for number in (2, 3):
        assert rig.engine.run_ahead(load_job(number, names, HOST_DRAM, [0], [10 + number]), begun, by_layers=True)
        assert not rig.engine.layers.is_open
        assert torch.equal(rig.hbm[:, 10 + number], rig.hbm[:, 0])
        assert not rig.reports(1)[number].failed
        rig.engine.prepare_layers()


@pytest.mark.usefixtures("_small")
def test_an_error_in_a_later_group_starts_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    names = keys(1)
    rig.store(names, [0], [0])

    def broken() -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(rig.engine._copy, "by_layers", lambda *_: [lambda: None, broken])
    begun = ComputeFence(torch.device("cpu"))
    assert not rig.engine.run_ahead(load_job(2, names, HOST_DRAM, [0], [10]), begun, by_layers=True)
    assert not rig.engine.layers.is_open
    assert not rig.engine.poll(0.05), "what did not start has no report"
    assert not rig.load(names, HOST_DRAM, [0], [10]).failed


def test_without_room_for_the_buffers_loads_arrive_at_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("dynamo_connectors.row_copy.prepare_layers", full)
    rig.engine.prepare_layers()
    assert "will not arrive layer by layer: CUDA out of memory" in caplog.text
    assert not rig.engine._copy.by_layers([0], [0])


def test_memory_stays_while_a_load_that_ran_ahead_still_reads_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = keys(1)
    rig.store(names, [0], [0])
    assert rig.engine.run_ahead(load_job(2, names, HOST_DRAM, [0], [10]))
    assert not rig.reports(1)[2].failed
    monkeypatch.setattr("dynamo_connectors.transfer._CLOSE_SECONDS", 0.05)
    with monkeypatch.context() as hung:
        hung.setattr(rig.engine._ahead, "is_done", lambda: False)
        rig.engine.close()
    assert "still running" in caplog.text
    assert bytes(rig.dram.rows[0]), "given back under a copy"
    rig.dram.close()
