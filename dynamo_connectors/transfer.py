"""Moves blocks between HBM, host rows and the tiers below on background threads, and reports how each job ended.

One worker owns one engine. The engine's own thread only submits and polls; nothing here ever waits on that thread.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from dynamo_kernels.block_view import BlockView
from dynamo_kernels.compression import Codec
from dynamo_kernels.fence import ComputeFence, CopyLane, SideStream
from dynamo_kernels.layered import LayerStream

from dynamo_connectors.below import Below, PeersBelow
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.config import HOST_DRAM, NVME_SSD, OBJECT_STORE, PEER
from dynamo_connectors.errors import StoreError
from dynamo_connectors.hbm_rows import HbmRows
from dynamo_connectors.jobs import EraseJob, JobReport, LoadItem, LoadJob, Moved, MoveItem, MoveJob, StoreItem, StoreJob
from dynamo_connectors.lanes import Lane
from dynamo_connectors.loads import reasons
from dynamo_connectors.row_copy import RowCopy
from dynamo_connectors.tiers.base import Batch, LowerTier, Place
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.tiers.nvme import NvmeStore
from dynamo_connectors.tiers.nvme_lanes import NvmeTier
from dynamo_connectors.tiers.object import ObjectStore
from dynamo_connectors.transport.peer_tier import PeerTier

log = logging.getLogger(__name__)

Job: TypeAlias = StoreJob | LoadJob | MoveJob | EraseJob

#: A load that queued until less than this share of its time was left does not set out: it would hardly arrive, and its
#: hanging up would look like a failure of the store.
_LEAST_TIME_LEFT = 0.1
#: Blocks of a store that become readable together: peers that wait for the first need not wait for the last.
_STORED_AT_A_TIME = 64
#: How long stopping may take when a device does not answer.
_CLOSE_SECONDS = 10.0


@dataclass(frozen=True)
class Stores:
    """The bytes below HBM that one worker owns. Tiers that are not configured are absent."""

    dram: DramStore
    disk: NvmeStore | None = None
    object_store: ObjectStore | None = None
    #: How the rows of host memory, and so of every tier below it, are compressed.
    codec: Codec | None = None
    #: Makes the peer tier, which reads into this slab, and these rows, and no other memory.
    peer: Callable[[DramStore, HbmRows | None], PeerTier] | None = None
    peer_rows: HbmRows | None = None


@dataclass
class _Outcome:
    """How a job went so far."""

    failed: dict[BlockKey, str] = field(default_factory=dict)
    moved: list[Moved] = field(default_factory=list)
    sent: bool = False

    def note_move(self, tier: str, blocks: int, row_bytes: int, started: float) -> None:
        if blocks:
            self.moved.append(Moved(tier, blocks * row_bytes, time.monotonic() - started))


class TransferEngine:
    """Stores (HBM to host), loads (any tier to HBM), moves (host to a tier below, and back) and erasures of one worker.

    Every submitted job is reported once: if its thread dies, if it is cancelled, and if it could not even start.
    """

    def __init__(self, hbm: BlockView, stores: Stores) -> None:
        self._dram = stores.dram
        self._device = hbm.device
        self._copy = RowCopy(hbm, stores.dram.rows, stores.codec)
        self._reports: queue.SimpleQueue[JobReport] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._unreported = 0
        self._closed = False
        self._objects = stores.object_store
        self._side = SideStream(hbm.device)
        #: For loads that arrive layer by layer.
        self.layers = LayerStream(hbm.device, len(hbm.parts))
        #: Behind the last load that ran ahead, and when the last of them that was awaited had arrived.
        self._ahead = ComputeFence(self._device)
        self._arrived_at = 0.0
        # A lane per kind keeps its jobs in order, and lets loads overtake stores.
        self._store_lane = Lane("kvbm-store", 1)
        self._load_lane = Lane("kvbm-load", 1)
        #: Fastest first.
        self._below: dict[str, Below] = {}
        dram, disk, objects, codec = stores.dram, stores.disk, stores.object_store, stores.codec
        if disk is not None:
            self._below[NVME_SSD] = Below(NVME_SSD, lambda _: NvmeTier(disk), dram, hbm, codec)
        if objects is not None:
            self._below[OBJECT_STORE] = Below(OBJECT_STORE, lambda _: objects, dram, hbm, codec)
        if stores.peer is not None:
            self._below[PEER] = PeersBelow(stores.peer, dram, hbm, codec, stores.peer_rows)

    def submit(self, job: Job, fence: ComputeFence) -> None:
        """Starts `job` once the compute before `fence` is done. Its report comes out of `poll`, always."""
        with self._lock:
            self._unreported += 1
        if isinstance(job, StoreJob):
            ended = self._store_lane.submit(partial(self._store, job, fence))
        elif isinstance(job, LoadJob):
            tiers = {item.tier for item in job.items}
            lane = next((self._below[name].lane for name in reversed(self._below) if name in tiers), self._load_lane)
            ended = lane.submit(partial(self._load, job, fence, time.monotonic()))
        elif isinstance(job, MoveJob):
            ended = self._move(job)
        else:
            ended = self._erase(job)
        ended.add_done_callback(partial(self._report, job))

    def prepare_layers(self) -> None:
        """Lets loads run ahead layer by layer; before any block means anything."""
        try:
            self._copy.prepare_layers()
        except Exception as error:  # noqa: BLE001 - whatever it is, loads that arrive at once do without
            log.warning("dynamo: loads will not arrive layer by layer: %s", error)

    def run_ahead(self, job: LoadJob, beside: ComputeFence | None = None, by_layers: bool = False) -> bool:
        """Starts a load from host memory in the order of the current stream, the engine's own: what that is given from
        now on sees the bytes. With `beside` it starts after that fence, and the stream waits for it at `join`.

        With `by_layers` the stream waits for it in `layers`, part by part; where the load is too small for that, it is
        as if neither was given.

        The report comes when the bytes are there. False, and nothing is started, where that cannot be promised: then
        the job is to be submitted.
        """
        if not all(item.tier == HOST_DRAM and self._dram.holds(item.slot, item.key) for item in job.items):
            return False
        slots, blocks = [item.slot for item in job.items], [item.block for item in job.items]
        called = time.monotonic()
        try:
            copies = self._copy.by_layers(slots, blocks) if by_layers else []
            if by_layers and not copies:
                beside = None
            begun = ComputeFence(self._device) if beside is None else beside
            if copies:
                arrived = self.layers.start(begun, copies)
            else:
                with nullcontext() if beside is None else self._side.after(beside):
                    if not self._copy.start_up(slots, blocks):
                        return False
                arrived = self._ahead = ComputeFence(self._device) if beside is None else self._side.fence()
        except Exception:
            log.exception("dynamo: load %d could not run ahead", job.job_id)
            return False
        with self._lock:
            self._unreported += 1
        ended = self._load_lane.submit(partial(self._await_arrival, job, (begun, arrived), called))
        ended.add_done_callback(partial(self._report, job))
        return True

    def join(self) -> None:
        """What the current stream is given from now on sees the loads that ran beside it."""
        self._side.join()

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
        """Finishes what has started, drops what has not, and gives the memory and the disk back. Idempotent.

        Takes `_CLOSE_SECONDS` at most: a thread that a device keeps longer is left behind, with the memory it uses.
        """
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + _CLOSE_SECONDS
        ended = [lane.stop(deadline) for lane in (self._store_lane, self._load_lane)]
        for below in self._below.values():
            ended += [below.tier.close(deadline), below.lane.stop(deadline)]
        # A lane that stops lets go of loads whose copies go on; the memory that they read must stay until those end.
        ahead = (self._ahead, self.layers.fence())
        while not all(fence.is_done() for fence in ahead) and time.monotonic() < deadline:
            time.sleep(0.001)
        if not all(ended) or not all(fence.is_done() for fence in ahead):
            log.error("dynamo: stopped while transfers were still running; their memory stays until this process ends")
            return
        del self._copy
        for below in self._below.values():
            below.close()
        self._dram.close()

    def check(self) -> None:
        with self._lock:
            assert self._unreported >= 0, "a job was reported twice"
        for below in self._below.values():
            below.check()

    def _report(self, job: Job, ended: Future[_Outcome]) -> None:
        """Runs as the last thing of every job, on whichever thread ended it."""
        try:
            outcome = ended.result()
        except CancelledError:
            outcome = _Outcome(dict.fromkeys(_keys_of(job), "closed"))
        except BaseException:
            # The boundary of a background task: whatever went wrong, the blocks are a miss and the engine recomputes.
            log.exception("dynamo: %s %d failed; its blocks are treated as a miss", type(job).__name__, job.job_id)
            # Nobody knows how far it came.
            outcome = _Outcome(dict.fromkeys(_keys_of(job), "internal_error"), sent=isinstance(job, MoveJob))
        with self._lock:
            self._unreported -= 1
        self._reports.put(JobReport(job.job_id, outcome.failed, tuple(outcome.moved), outcome.sent))

    # -- between HBM and host memory ------------------------------------------------------------------------------
    def _store(self, job: StoreJob, fence: ComputeFence) -> _Outcome:
        fence.wait()
        started, outcome = time.monotonic(), _Outcome()
        for item in job.items:
            self._dram.set_key(item.slot, None)
        parts = [job.items[at : at + _STORED_AT_A_TIME] for at in range(0, len(job.items), _STORED_AT_A_TIME)]
        with CopyLane(self._device):
            copies = [self._start_down(part) for part in parts]
            for part, copied in zip(parts, copies, strict=True):
                copied.wait()
                for item in part:
                    self._dram.set_key(item.slot, item.key)
                self._dram.tell_of_arrivals()
        outcome.note_move(HOST_DRAM, len(job.items), self._dram.row_bytes, started)
        return outcome

    def _start_down(self, items: Sequence[StoreItem]) -> ComputeFence:
        self._copy.start_down([item.block for item in items], [item.slot for item in items])
        return ComputeFence(self._device)

    def _load(self, job: LoadJob, fence: ComputeFence, submitted: float) -> _Outcome:
        # Waiting for its turn is part of what a load may take; the compute before it would delay a miss just as well.
        queued_seconds = time.monotonic() - submitted
        fence.wait()
        outcome = _Outcome()
        by_tier: dict[str, list[LoadItem]] = {}
        for item in job.items:
            by_tier.setdefault(item.tier, []).append(item)
        if HOST_DRAM in by_tier:
            self._load_from_dram(by_tier.pop(HOST_DRAM), outcome)
        if not by_tier:
            self._arrived_at = time.monotonic()  # what ran ahead meanwhile was not under way alone
        for name, items in by_tier.items():
            started, below = time.monotonic(), self._below[name]
            limit = below.tier.deadline_seconds
            left = limit - queued_seconds
            good = below.load(items, left if left > limit * _LEAST_TIME_LEFT else 0.0, outcome.failed)
            # Told even if nothing came: a tier that keeps its requests waiting must be known for that.
            seconds = queued_seconds + time.monotonic() - started
            outcome.moved.append(Moved(name, good * self._dram.row_bytes, seconds))
        return outcome

    def _load_from_dram(self, items: Sequence[LoadItem], outcome: _Outcome) -> None:
        started = time.monotonic()
        good: list[LoadItem] = []
        for item in items:
            if self._dram.holds(item.slot, item.key):
                good.append(item)
            else:
                outcome.failed[item.key] = "wrong_key"
        with CopyLane(self._device):
            self._copy.up([item.slot for item in good], [item.block for item in good])
        outcome.note_move(HOST_DRAM, len(good), self._dram.row_bytes, started)

    def _await_arrival(self, job: LoadJob, fences: tuple[ComputeFence, ComputeFence], called: float) -> _Outcome:
        begun, arrived = fences
        # Each is told with its own time: without the compute before it, and without the copies that came before it.
        if not begun.is_done():
            begun.wait()
            called = time.monotonic()
        started = max(called, self._arrived_at)
        arrived.wait()
        self._arrived_at = time.monotonic()
        outcome = _Outcome()
        outcome.note_move(HOST_DRAM, len(job.items), self._dram.row_bytes, started)
        return outcome

    # -- between host memory and the tiers below ------------------------------------------------------------------
    def _move(self, job: MoveJob) -> Future[_Outcome]:
        """Starts a move; no thread waits for it. The host rows are pinned by their index until the report."""
        ended: Future[_Outcome] = Future()
        try:
            if job.source_tier == HOST_DRAM:
                _Move(self._dram, self._below[job.target_tier].tier, job, ended).down()
            else:
                _Move(self._dram, self._below[job.source_tier].tier, job, ended).up()
        except Exception as error:  # noqa: BLE001 - reported like the error of any other job
            ended.set_exception(error)
        return ended

    def _erase(self, job: EraseJob) -> Future[_Outcome]:
        ended: Future[_Outcome] = Future()

        def end(done: Future[Sequence[StoreError | None]]) -> None:
            why = zip(job.chunks, reasons(done, len(job.chunks)), strict=True)
            ended.set_result(_Outcome({chunk: reason for chunk, reason in why if reason is not None}))

        if self._objects is None:
            ended.set_exception(StoreError("no_tier", f"there is no {job.tier} to erase in"))
        else:
            self._objects.erase(job.chunks).add_done_callback(end)
        return ended


def _keys_of(job: Job) -> Sequence[BlockKey]:
    return job.chunks if isinstance(job, EraseJob) else [item.key for item in job.items]


class _Move:
    """One MoveJob on its way. `ended` gets its outcome when the last of its batches has one."""

    def __init__(self, dram: DramStore, below: LowerTier, job: MoveJob, ended: Future[_Outcome]) -> None:
        self._dram = dram
        self._below = below
        self._job = job
        self._ended = ended
        self._outcome = _Outcome()
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._batches: Sequence[Batch] = ()
        self._open_batches = 0
        self._good = 0

    def down(self) -> None:
        items: list[MoveItem] = []
        for item in self._job.items:
            if self._dram.holds(item.source_slot, item.key):
                items.append(item)
            else:
                self._outcome.failed[item.key] = "wrong_key"
        places = [Place(item.key, item.target_slot, item.chunk, item.row) for item in items]
        rows = [memoryview(self._dram.rows[item.source_slot]) for item in items]
        self._await(items, self._below.write(places, rows))

    def up(self) -> None:
        items = self._job.items
        for item in items:
            self._dram.set_key(item.target_slot, None)
        places = [Place(item.key, item.source_slot, item.chunk, item.row) for item in items]
        rows = [memoryview(self._dram.rows[item.target_slot]) for item in items]
        self._await(items, self._below.read(places, rows))

    def _await(self, items: Sequence[MoveItem], batches: Sequence[Batch]) -> None:
        self._batches, self._open_batches = batches, len(batches)
        if not batches:
            self._ended.set_result(self._outcome)
        for batch in batches:
            batch.outcome.add_done_callback(partial(self._end_batch, [items[at] for at in batch.positions]))

    def _end_batch(self, items: Sequence[MoveItem], done: Future[Sequence[StoreError | None]]) -> None:
        going_up = self._job.target_tier == HOST_DRAM
        with self._lock:
            for item, reason in zip(items, reasons(done, len(items)), strict=True):
                if reason is not None:
                    self._outcome.failed[item.key] = reason
                    continue
                self._good += 1
                if going_up:
                    self._dram.set_key(item.target_slot, item.key)
            self._open_batches -= 1
            if self._open_batches:
                return
        self._outcome.sent = not going_up and any(batch.sent() for batch in self._batches)
        tier = self._job.source_tier if going_up else self._job.target_tier
        self._outcome.note_move(tier, self._good, self._dram.row_bytes, self._started)
        self._ended.set_result(self._outcome)
