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
