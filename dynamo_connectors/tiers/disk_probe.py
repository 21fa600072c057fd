"""How fast a slab can be read, measured at start-up: the load gate's first estimate, before any request pays for one.

Through descriptors of its own, past the store: the index log does not hear of it. Blocks of an earlier engine are read
where they lie; otherwise a few free slots are written first, with bytes that no header vouches for.
"""

from __future__ import annotations

import mmap
import os
import threading
import time

from dynamo_connectors.tiers.nvme import NvmeStore, slot_bytes, slot_offset
from dynamo_connectors.tiers.nvme_lanes import QUEUE_DEPTH
from dynamo_connectors.tiers.slab_format import PAGE_BYTES

_REQUEST_BYTES = 1 << 20
#: Enough for a disk's own rate, little enough to take some 10 ms.
_PROBE_BYTES = 32 << 20
#: What answers later is slow enough to be known for it.
_LONGEST_SECONDS = 0.5


def read_rate(store: NvmeStore, longest_seconds: float = _LONGEST_SECONDS) -> float | None:
    """Bytes a second, of as many requests at a time as loads make; None when the disk gave none. Never raises."""
    probe = _Probe(store)
    threads = [threading.Thread(target=probe.run, name="kvbm-disk-probe", daemon=True) for _ in range(QUEUE_DEPTH)]
    deadline = time.monotonic() + longest_seconds
    started: list[threading.Thread] = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
    except RuntimeError:  # no more threads: those that run would wait for the others
        probe.stop()
    for thread in started:
        thread.join(max(0.0, deadline - time.monotonic()))
    return probe.stop()


class _Probe:
    """Pieces of a slab that threads share out among themselves: all written, if need be, before any is read."""

    def __init__(self, store: NvmeStore) -> None:
        self._path = store.path
        self._direct = os.O_DIRECT if store.direct else 0
        self._size, offsets = _pieces(store)
        self._lock = threading.Lock()
        self._to_write = [] if store.recovered else list(offsets)
        self._to_read = list(offsets)
        self._written = threading.Barrier(QUEUE_DEPTH)
        self._started = 0.0
        self._ended = 0.0
        self._bytes = 0
        self._stopped = False

    def run(self) -> None:
        try:
            buffer = memoryview(mmap.mmap(-1, self._size))
            fd = os.open(self._path, os.O_RDWR | self._direct)
        except (OSError, ValueError):
            self._written.abort()
            return
        try:
            while (offset := self._next(self._to_write)) is not None:
                os.pwritev(fd, [buffer], offset)
            self._written.wait()
            with self._lock:
                self._started = self._started or time.monotonic()
            while (offset := self._next(self._to_read)) is not None:
                self._count(os.preadv(fd, [buffer], offset))
        except (OSError, threading.BrokenBarrierError):
            self._written.abort()
        finally:
            os.close(fd)

    def stop(self) -> float | None:
        """The rate so far. Threads that a disk still keeps end with their request."""
        with self._lock:
            self._stopped = True
            if not self._started:  # who waits for the others to have written waits no longer
                self._written.abort()
            seconds = self._ended - self._started
            return self._bytes / seconds if self._bytes and seconds > 0 else None

    def _next(self, offsets: list[int]) -> int | None:
        with self._lock:
            return offsets.pop() if offsets and not self._stopped else None

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self._bytes += num_bytes
            self._ended = time.monotonic()


def _pieces(store: NvmeStore) -> tuple[int, list[int]]:
    """Bytes of a request, and where requests begin: at the slots that hold something, else from the first slot on."""
    each, most = slot_bytes(store.row_bytes), _PROBE_BYTES
    if store.recovered:
        size = min(_REQUEST_BYTES, each)
        return size, [slot_offset(slot, store.row_bytes) for slot, _ in store.recovered[: max(1, most // size)]]
    room = min(most, store.capacity_blocks * each)
    size = min(_REQUEST_BYTES, room // PAGE_BYTES * PAGE_BYTES)
    return size, [slot_offset(0, store.row_bytes) + start for start in range(0, room - size + 1, size)]
