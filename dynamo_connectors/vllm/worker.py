"""The worker half: owns this worker's bytes, starts the jobs it is told to, and reports how they ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from dynamo_kernels.block_view import BlockView
from dynamo_kernels.fence import ComputeFence

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.jobs import JobReport, LoadJob
from dynamo_connectors.layout import KVLayout
from dynamo_connectors.transfer import Stores, TransferEngine
from dynamo_connectors.vllm.compat import engine_logger
from dynamo_connectors.vllm.messages import StepPlan, WorkerReports

log = engine_logger(__name__)

#: How long an idle step may wait for a job to end, instead of spinning through empty steps.
_IDLE_WAIT_SECONDS = 0.001


class WorkerHalf:
    """One per worker. Called by vLLM's model runner only; the copies run on the transfer engine's threads."""

    def __init__(self, tensors: list[torch.Tensor], layout: KVLayout, stores: Stores) -> None:
        hbm = BlockView.of_pages(tensors, [page.page_bytes for page in layout.pages])
        self._device = hbm.device
        self._row_bytes = layout.row_bytes
        self._transfers = TransferEngine(hbm, stores)
        self._loads: dict[int, LoadJob] = {}
        self._running: dict[int, tuple[str, int]] = {}
        self._reports: list[JobReport] = []
        self._loaded_requests: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._counts: Counter[tuple[str, str]] = Counter()

    def start_loads(self, plan: StepPlan) -> None:
        for load in plan.loads:
            self._loads[load.job_id] = load
            self._running[load.job_id] = ("onboarded_bytes", len(load.items))
            self._transfers.submit(load, ComputeFence(self._device))

    def start_offloads(self, plan: StepPlan) -> None:
        """Called after the step's compute was enqueued: the blocks to store were filled by earlier steps."""
        for store in plan.stores:
            self._running[store.job_id] = ("offloaded_bytes", len(store.items))
            self._transfers.submit(store, ComputeFence(self._device))
        for spill in plan.spills:
            self._running[spill.job_id] = ("spilled_bytes", len(spill.items))
            self._transfers.submit(spill, ComputeFence(self._device))
        if plan.is_idle and self._running:
            self._collect(_IDLE_WAIT_SECONDS)

    def take_loaded_requests(self) -> set[str]:
        """Requests whose load ended, well or badly, since the last call."""
        self._collect(0.0)
        loaded, self._loaded_requests = self._loaded_requests, set()
        return loaded

    def take_bad_blocks(self) -> set[int]:
        """HBM blocks that a load did not fill. Never later than the request they belong to."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_reports(self) -> WorkerReports | None:
        reports, self._reports = self._reports, []
        return WorkerReports.of(reports) if reports else None

    def take_counts(self) -> Mapping[tuple[str, str], int]:
        counts, self._counts = self._counts, Counter()
        return counts

    def close(self) -> None:
        self._transfers.close()

    def check(self) -> None:
        assert self._loads.keys() <= self._running.keys(), "a load is known that is not running"

    def _collect(self, wait_seconds: float) -> None:
        for report in self._transfers.poll(wait_seconds):
            what, blocks = self._running.pop(report.job_id)
            self._counts[what, ""] += (blocks - len(report.failed)) * self._row_bytes
            self._reports.append(report)
            load = self._loads.pop(report.job_id, None)
            if load is not None:
                self._end_load(load, report.failed)

    def _end_load(self, load: LoadJob, failed: Mapping[BlockKey, str]) -> None:
        self._loaded_requests.add(load.request_id)
        bad = [item.block for item in load.items if item.key in failed]
        self._bad_blocks.update(bad)
        self._bad_blocks.update(load.missing_blocks)
        if bad or load.missing_blocks:
            log.warning(
                "dynamo: %d of %d blocks of request %s could not be loaded (%s); vLLM recomputes from there",
                len(bad) + len(load.missing_blocks),
                len(load.items) + len(load.missing_blocks),
                load.request_id,
                ", ".join(sorted(set(failed.values()))) or "evicted",
            )
