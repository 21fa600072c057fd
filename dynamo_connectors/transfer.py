"""Moves blocks between HBM, host rows and disk on background threads, and reports what happened to each job.

One worker owns one engine. The engine's own thread only submits and polls; nothing here ever waits on that thread.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import torch
from dynamo_kernels.block_view import BlockView
from dynamo_kernels.copy import copy_blocks
from dynamo_kernels.errors import CopyError
from dynamo_kernels.fence import ComputeFence, CopyLane

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.jobs import DISK_TIER, DRAM_TIER, JobReport, LoadItem, LoadJob, SpillJob, StoreJob
from dynamo_connectors.tiers.base import TierStore
from dynamo_connectors.tiers.dram import DramStore

log = logging.getLogger(__name__)

Job: TypeAlias = StoreJob | LoadJob | SpillJob

#: Rows read from disk before they are copied up in one go: enough to keep `_DISK_READERS` busy, little memory.
_STAGING_ROWS = 16
_DISK_READERS = 4
_DISK_WRITERS = 2


@dataclass(frozen=True)
class Stores:
    """The bytes below HBM that one worker owns. `disk` is absent without an nvme_ssd tier."""

    dram: DramStore
    disk: TierStore | None = None


class TransferEngine:
    """Stores (HBM to DRAM), loads (DRAM or disk to HBM) and spills (DRAM to disk) of one worker."""

    def __init__(self, hbm: BlockView, stores: Stores) -> None:
        self._hbm = hbm
        self._stores = stores
        self._device = hbm.device
        self._rows = BlockView.of_rows(torch.from_numpy(stores.dram.rows), hbm.part_bytes)
        self._reports: queue.SimpleQueue[JobReport] = queue.SimpleQueue()
        # One lane per direction keeps jobs of one kind in order, and lets loads overtake stores.
        self._store_lane = ThreadPoolExecutor(1, thread_name_prefix="kvbm-store")
        self._load_lane = ThreadPoolExecutor(1, thread_name_prefix="kvbm-load")
        self._readers = ThreadPoolExecutor(_DISK_READERS, thread_name_prefix="kvbm-disk-read")
        self._writers = ThreadPoolExecutor(_DISK_WRITERS, thread_name_prefix="kvbm-disk-write")
        self._closed = False

    def submit(self, job: Job, fence: ComputeFence) -> None:
        """Starts `job` once the compute before `fence` is done. Its report comes out of `poll`, always."""
        if isinstance(job, StoreJob):
            self._store_lane.submit(self._run, job, lambda: self._store(job, fence))
        elif isinstance(job, LoadJob):
            self._load_lane.submit(self._run, job, lambda: self._load(job, fence))
        else:
            self._writers.submit(self._run, job, lambda: self._spill(job))

    def poll(self, wait_seconds: float = 0.0) -> list[JobReport]:
        """Finished jobs. Waits at most `wait_seconds` for the first one."""
        reports: list[JobReport] = []
        try:
            reports.append(self._reports.get(timeout=wait_seconds) if wait_seconds else self._reports.get_nowait())
            while True:
                reports.append(self._reports.get_nowait())
        except queue.Empty:
            return reports

    def close(self) -> None:
        """Finishes what has started, drops what has not, and gives the memory and the disk back."""
        if self._closed:
            return
        self._closed = True
        for lane in (self._store_lane, self._load_lane, self._readers, self._writers):
            lane.shutdown(wait=True, cancel_futures=True)
        del self._rows
        self._stores.dram.close()
        if self._stores.disk is not None:
            self._stores.disk.close()

    def _run(self, job: Job, work: Callable[[], dict[BlockKey, str]]) -> None:
        try:
            failed = work()
        except Exception:
            # The boundary of a background task: whatever went wrong, the blocks are a miss and the engine recomputes.
            log.exception("dynamo: %s %d failed; its blocks are treated as a miss", type(job).__name__, job.job_id)
            failed = {item.key: "internal_error" for item in job.items}
        self._reports.put(JobReport(job.job_id, failed))

    def _store(self, job: StoreJob, fence: ComputeFence) -> dict[BlockKey, str]:
        fence.wait()
        dram = self._stores.dram
        for item in job.items:
            dram.set_key(item.slot, None)
        with CopyLane(self._device):
            copy_blocks(self._hbm, [item.block for item in job.items], self._rows, [item.slot for item in job.items])
        for item in job.items:
            dram.set_key(item.slot, item.key)
        return {}

    def _load(self, job: LoadJob, fence: ComputeFence) -> dict[BlockKey, str]:
        fence.wait()
        failed: dict[BlockKey, str] = {}
        from_dram = [item for item in job.items if item.tier == DRAM_TIER]
        from_disk = [item for item in job.items if item.tier == DISK_TIER]
        with CopyLane(self._device):
            self._load_from_dram(from_dram, failed)
            for start in range(0, len(from_disk), _STAGING_ROWS):
                self._load_from_disk(from_disk[start : start + _STAGING_ROWS], failed)
        return failed

    def _load_from_dram(self, items: Sequence[LoadItem], failed: dict[BlockKey, str]) -> None:
        good: list[LoadItem] = []
        for item in items:
            if self._stores.dram.holds(item.slot, item.key):
                good.append(item)
            else:
                failed[item.key] = "wrong_key"
        copy_blocks(self._rows, [item.slot for item in good], self._hbm, [item.block for item in good])

    def _load_from_disk(self, items: Sequence[LoadItem], failed: dict[BlockKey, str]) -> None:
        disk = self._stores.disk
        if disk is None:
            raise CopyError("a load names the nvme_ssd tier, which this worker does not have")
        # Rows of this batch alone: a read that is late, because this batch failed, can then only hit dead memory.
        rows = torch.empty((len(items), self._stores.dram.row_bytes), dtype=torch.uint8)
        staging, row_bytes = BlockView.of_rows(rows, self._hbm.part_bytes), rows.numpy()
        reads: list[Future[None]] = [
            self._readers.submit(disk.read, item.slot, item.key, memoryview(row_bytes[row]))
            for row, item in enumerate(items)
        ]
        good: list[tuple[int, LoadItem]] = []
        for row, (item, read) in enumerate(zip(items, reads, strict=True)):
            try:
                read.result()
            except StoreError as error:
                failed[item.key] = error.reason
                log.warning("dynamo: a block on disk is a miss: %s", error)
            else:
                good.append((row, item))
        copy_blocks(staging, [row for row, _ in good], self._hbm, [item.block for _, item in good])

    def _spill(self, job: SpillJob) -> dict[BlockKey, str]:
        disk = self._stores.disk
        if disk is None:
            raise CopyError("a spill names the nvme_ssd tier, which this worker does not have")
        failed: dict[BlockKey, str] = {}
        for item in job.items:
            if not self._stores.dram.holds(item.source_slot, item.key):
                failed[item.key] = "wrong_key"
                continue
            try:
                disk.write(item.target_slot, item.key, memoryview(self._stores.dram.rows[item.source_slot]))
            except StoreError as error:
                failed[item.key] = error.reason
                log.warning("dynamo: a block was not written to disk: %s", error)
        return failed
