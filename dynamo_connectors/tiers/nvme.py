"""G3, NVMe: one preallocated slab file per worker, a verified header before every block, O_DIRECT where it works.

The slab outlives the engine: the next one of the same namespace finds its blocks again (`recovered`). Nothing is synced
while blocks are written, because a header proves every slot on its first read; what it does not prove is a miss. A
device that fails again and again is left alone for a while. On-disk format: docs/on-disk-format.md.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dynamo_connectors.blocks import BlockKey, Namespace
from dynamo_connectors.errors import ConfigError, StoreError
from dynamo_connectors.tiers import slab_files, slot_header
from dynamo_connectors.tiers.circuit import Circuit
from dynamo_connectors.tiers.index_log import IndexLog
from dynamo_connectors.tiers.slab_format import (
    GENERATION_BYTES,
    PAGE_BYTES,
    Fact,
    Superblock,
    decode_superblock,
    encode_superblock,
    owner_of,
)
from dynamo_connectors.tiers.slot_header import HEADER_BYTES

log = logging.getLogger(__name__)

#: I/O errors in a row after which the tier is off, and how long until one operation may try again.
_ERRORS_TO_TURN_OFF = 8
_RETRY_SECONDS = 30.0
#: How long forgetting may keep its caller.
_FORGET_SECONDS = 5.0


def slot_bytes(row_bytes: int) -> int:
    """What one block of `row_bytes` takes on disk."""
    return HEADER_BYTES + -(-row_bytes // PAGE_BYTES) * PAGE_BYTES


def slot_offset(slot: int, row_bytes: int) -> int:
    """Where the header of `slot` lies in the slab's file."""
    return PAGE_BYTES + slot * slot_bytes(row_bytes)


class _SlotView(NamedTuple):
    """One slot in memory. A row that is aligned is its own payload; any other is copied through staging."""

    header: memoryview
    payload: memoryview
    #: What goes to the disk and comes from it, `slot_bytes` in all.
    vectors: tuple[memoryview, ...]


class NvmeStore:
    """`capacity_blocks` slots in one file under `directory`. A slab that is not `persistent` goes when it is closed."""

    def __init__(
        self,
        directory: Path,
        capacity_blocks: int,
        row_bytes: int,
        namespace: Namespace,
        persistent: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.capacity_blocks = capacity_blocks
        self.row_bytes = row_bytes
        #: (slot, key) of the blocks that an earlier engine left here, oldest first. Their bytes are proven when read.
        #: Whoever has taken them in empties it: it may be as large as the index.
        self.recovered: Sequence[tuple[int, BlockKey]] = ()
        self._slot_bytes = slot_bytes(row_bytes)
        self._namespace = namespace.digest
        self._clock = clock
        self._circuit = Circuit(_ERRORS_TO_TURN_OFF, _RETRY_SECONDS)
        self._sequence = itertools.count(1)
        self._local = threading.local()
        #: Guards what follows it.
        self._lock = threading.Lock()
        self._closed = False
        self._users = 0
        self._log: IndexLog | None = None
        self._generation = os.urandom(GENERATION_BYTES)
        self._fd, self.path = slab_files.claim_slab(directory, namespace.digest)
        self._starts_anew = False
        try:
            self.direct = self._open(persistent)
        except BaseException as error:
            self._undo_open()
            if not isinstance(error, OSError):
                raise
            raise ConfigError(
                f"{directory} cannot hold {self._slab_bytes / 1e9:.2f} GB for the nvme_ssd tier ({error.strerror}); "
                "free space there, lower --kvbm-nvme-gb or name another --kvbm-nvme-path"
            ) from error
        self._owner = owner_of(self._namespace, self._generation)

    def write(self, slot: int, key: BlockKey, row: memoryview) -> None:
        self.write_run(slot, [key], [row])

    def read(self, slot: int, key: BlockKey, into: memoryview) -> None:
        (error,) = self.read_run(slot, [key], [into])
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback names this frame: a circle would keep the buffers alive

    def write_run(self, first_slot: int, keys: Sequence[BlockKey], rows: Sequence[memoryview]) -> None:
        """Keeps `rows` in slots side by side, in one request to the disk: all of them or none."""
        self._refuse_outside(first_slot, len(keys))
        with self._lock:
            owner = self._owner
        sequences = [next(self._sequence) for _ in keys]
        staging = self._staging(len(keys))
        views = [self._view(staging, slot, row) for slot, row in enumerate(rows)]
        for view, key, row, sequence in zip(views, keys, rows, sequences, strict=True):
            if view.payload is not row:
                view.payload[:] = row
            view.header[:] = slot_header.encode(owner, key, view.payload, sequence)
        self._transfer("write", os.pwritev, views, first_slot)
        facts = [Fact(q, first_slot + i, key) for i, (q, key) in enumerate(zip(sequences, keys, strict=True))]
        with self._lock:
            # Forgotten meanwhile, these bytes name an owner that nobody is any more.
            index = self._log if owner == self._owner else None
        if index is not None:
            index.append(facts)

    def read_run(
        self, first_slot: int, keys: Sequence[BlockKey], into: Sequence[memoryview]
    ) -> list[StoreError | None]:
        """Fills `into` from slots side by side, in one request to the disk; says for each why not, or None.

        Raises `StoreError` when the request as a whole failed.
        """
        self._refuse_outside(first_slot, len(keys))
        staging = self._staging(len(keys))
        views = [self._view(staging, slot, row) for slot, row in enumerate(into)]
        self._transfer("read", os.preadv, views, first_slot)
        with self._lock:
            owner, index = self._owner, self._log
        outcomes: list[StoreError | None] = []
        for slot, (key, row, view) in enumerate(zip(keys, into, views, strict=True), first_slot):
            try:
                slot_header.verify(view.header, owner, key, view.payload)
                if view.payload is not row:
                    row[:] = view.payload
                outcomes.append(None)
            except StoreError as error:
                outcomes.append(error.with_traceback(None))
                if index is not None:
                    index.drop(slot, key)
        return outcomes

    def forget(self) -> None:
        """Nothing written so far is ever served again, and nothing that this process writes outlives it. Durable.

        For changed weights: what the files know as this namespace is not what the engine computes any more.
        """
        with self._lock:
            index, self._log = self._log, None
            self._generation = os.urandom(GENERATION_BYTES)
            self._owner = owner_of(self._namespace, self._generation)
            self.recovered = ()
            if index is None or self._closed:
                return
            self._users += 1
        # On a thread of its own: a disk that hangs must not hang the engine.
        thread = threading.Thread(target=self._forget_on_disk, args=(index,), name="kvbm-disk-forget", daemon=True)
        thread.start()
        thread.join(_FORGET_SECONDS)
        if thread.is_alive():
            log.error("dynamo: %s does not answer and still holds old blocks: delete it if this engine dies", self.path)

    def close(self) -> None:
        """Keeps the slab for the next engine, or removes it when nothing in it may outlive this one. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            index, self._log = self._log, None
        if index is not None:
            index.close()
            self._let_go()
        else:
            self._remove()

    def check(self) -> None:
        self._circuit.check()
        with self._lock:
            assert self._users >= 0, "more operations ended than began"
            assert self._closed or self._fd >= 0, "open without a file"
            index = self._log
        if index is not None:
            index.check()

    def _forget_on_disk(self, index: IndexLog) -> None:
        try:
            index.abandon()
            self._write_first_page(bytes(PAGE_BYTES))
            slab_files.log_path(self.path).unlink(missing_ok=True)
        except OSError as error:
            # The slab's name is the next thing that can be taken away; without it nobody opens the slab again.
            log.error("dynamo: %s cannot be marked as forgotten (%s); it is removed", self.path, error.strerror)
            with suppress(OSError):
                slab_files.remove_slab(self.path)
        finally:
            self._leave()

    # -- opening and closing --------------------------------------------------------------------------------------
    def _open(self, persistent: bool) -> bool:
        """Takes over what the slab holds, or starts it anew. Returns whether direct I/O is on."""
        why_not = "it is not to outlive the engine" if not persistent else self._take_over()
        if why_not is not None:
            self._starts_anew = True
            os.ftruncate(self._fd, 0)
            slab_files.log_path(self.path).unlink(missing_ok=True)
            slab_files.allocate(self._fd, self.path, self._slab_bytes)
            if persistent:
                self._log = IndexLog(slab_files.log_path(self.path), self._generation, self.capacity_blocks)
                block = Superblock(
                    self._namespace, self._generation, self.row_bytes, self._slot_bytes, self.capacity_blocks
                )
                self._write_first_page(encode_superblock(block))
        if why_not is None:
            log.info("dynamo: %s: %d blocks of an earlier engine found again", self.path, len(self.recovered))
        else:
            log.info("dynamo: %s starts empty: %s", self.path, why_not)
        slab_files.report_leftovers(self.path)
        return slab_files.enable_direct_io(self._fd, self._staging(1))

    def _take_over(self) -> str | None:
        """None when the slab is this namespace's and shape's, and its log was replayed; else why it starts anew."""
        size = os.fstat(self._fd).st_size
        if size == 0:
            return "it is new"
        try:
            block = decode_superblock(os.pread(self._fd, PAGE_BYTES, 0))
        except StoreError as error:
            return str(error)
        if block.namespace != self._namespace:
            return "it belongs to another model or configuration"
        if block[2:] != (self.row_bytes, self._slot_bytes, self.capacity_blocks):
            return "it has other sizes"
        if size != self._slab_bytes:
            return f"it was cut to {size} of {self._slab_bytes} bytes"
        self._generation = block.generation
        self._log = IndexLog(slab_files.log_path(self.path), self._generation, self.capacity_blocks)
        self.recovered = [(fact.slot, fact.key) for fact in self._log.recovered]
        self._sequence = itertools.count(max((fact.sequence for fact in self._log.recovered), default=0) + 1)
        self._log.recovered = ()
        return None

    @property
    def _slab_bytes(self) -> int:
        return slot_offset(self.capacity_blocks, self.row_bytes)

    def _write_first_page(self, page: bytes) -> None:
        buffer = mmap.mmap(-1, PAGE_BYTES)
        buffer[:] = page
        if os.pwrite(self._fd, buffer, 0) != PAGE_BYTES:
            raise OSError("short write")
        os.fsync(self._fd)

    def _undo_open(self) -> None:
        """Leaves a slab that was taken over as it is, and no half-made one."""
        if self._log is not None:
            self._log.abandon()
        if self._starts_anew:
            self._remove()
        else:
            self._let_go()

    def _remove(self) -> None:
        # The name goes first: whoever opens it after the lock is gone would otherwise share a deleted file.
        try:
            slab_files.remove_slab(self.path)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """The descriptor goes with its last user: its number in other hands would receive our writes."""
        with self._lock:
            self._closed = True
            if self._users == 0 and self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
        # The buffers go with their last user, be it a read in flight or the traceback of an error.
        self._local = threading.local()

    # -- reading and writing --------------------------------------------------------------------------------------
    def _refuse_outside(self, first_slot: int, count: int) -> None:
        # A write behind the end would grow the file past what the user allowed.
        if not 0 <= first_slot <= self.capacity_blocks - count:
            raise StoreError("no_slot", f"{self.path}: slot {first_slot} is outside the {self.capacity_blocks}")

    def _staging(self, slots: int) -> memoryview:
        """Page-aligned room for `slots` slots, one per thread, as O_DIRECT asks for."""
        staging: mmap.mmap | None = getattr(self._local, "staging", None)
        if staging is None or len(staging) < slots * self._slot_bytes:
            staging = mmap.mmap(-1, slots * self._slot_bytes)
            self._local.staging = staging
        return memoryview(staging)

    def _view(self, staging: memoryview, slot: int, row: memoryview) -> _SlotView:
        start = slot * self._slot_bytes
        whole = staging[start : start + self._slot_bytes]
        header = whole[:HEADER_BYTES]
        if row.nbytes == self.row_bytes and row.nbytes % PAGE_BYTES == 0 and _address(row) % PAGE_BYTES == 0:
            return _SlotView(header, row, (header, row))
        return _SlotView(header, whole[HEADER_BYTES : HEADER_BYTES + self.row_bytes], (whole,))

    def _transfer(
        self,
        what: str,
        call: Callable[[int, Sequence[memoryview], int], int],
        views: Sequence[_SlotView],
        first_slot: int,
    ) -> None:
        vectors = [part for view in views for part in view.vectors]
        wanted = sum(vector.nbytes for vector in vectors)
        with self._device() as fd:
            try:
                done = call(fd, vectors, slot_offset(first_slot, self.row_bytes))
            except OSError as error:
                self._note_error()
                raise StoreError(f"{what}_failed", f"{self.path}: {error.strerror}") from error
        if done != wanted:
            self._note_error()
            raise StoreError(f"short_{what}", f"{self.path}: {done} of {wanted} bytes")
        with self._lock:
            works_again = self._circuit.note_success()
        if works_again:
            log.warning("dynamo: nvme_ssd tier on again: %s works", self.path)

    @contextmanager
    def _device(self) -> Iterator[int]:
        with self._lock:
            if self._closed:
                raise StoreError("closed", f"{self.path} is closed")
            if not self._circuit.admits(self._clock()):
                raise StoreError("tier_off", f"{self.path} failed {_ERRORS_TO_TURN_OFF} times in a row")
            self._users += 1
        try:
            yield self._fd
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            last_one = self._closed and self._users == 0
        if last_one:
            self._let_go()

    def _note_error(self) -> None:
        with self._lock:
            turned_off = self._circuit.note_error(self._clock())
        if turned_off:
            log.error(
                "dynamo: nvme_ssd tier off: %s failed %d times in a row; the engine goes on, next try in %d s",
                self.path,
                _ERRORS_TO_TURN_OFF,
                _RETRY_SECONDS,
            )


def _address(row: memoryview) -> int:
    return int(np.frombuffer(row, dtype=np.uint8).ctypes.data)
