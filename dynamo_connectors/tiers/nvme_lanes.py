"""The threads before a slab: enough requests at a time to keep the disk busy, slots side by side in one request."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence

from dynamo_connectors.errors import StoreError
from dynamo_connectors.lanes import Lane
from dynamo_connectors.tiers.base import Batch, Buffer, Place
from dynamo_connectors.tiers.nvme import NvmeStore

log = logging.getLogger(__name__)

#: Requests at a time in each direction.
QUEUE_DEPTH = 8
#: Slots side by side are joined up to this size. A disk gains nothing from larger reads, whose request waits for the
#: last of them; larger writes take less of the interpreter from the engine.
_READ_BYTES = 1 << 20
_WRITE_BYTES = 8 << 20
#: The system takes 1024 pieces in one request, a slot has at most two.
_MAX_RUN_SLOTS = 256


class NvmeTier:
    """A `LowerTier` over one slab. Owns the store. Reads and writes have threads of their own: reads never queue
    behind writes."""

    deadline_seconds = 30.0

    def __init__(self, store: NvmeStore) -> None:
        self.store = store
        self._read_slots, self._write_slots = (
            max(1, min(_MAX_RUN_SLOTS, most // store.row_bytes)) for most in (_READ_BYTES, _WRITE_BYTES)
        )
        self._readers = Lane("kvbm-disk-read", QUEUE_DEPTH)
        try:
            self._writers = Lane("kvbm-disk-write", QUEUE_DEPTH)
        except BaseException:
            self._readers.stop(time.monotonic() + 1)
            raise

    def read(self, places: Sequence[Place], into: Sequence[Buffer]) -> list[Batch]:
        return [
            Batch(run, self._readers.submit(lambda run=run: self._read(places, into, run)))  # type: ignore[misc]
            for run in _runs(places, self._read_slots)
        ]

    def write(self, places: Sequence[Place], rows: Sequence[Buffer]) -> list[Batch]:
        return [
            Batch(run, self._writers.submit(lambda run=run: self._write(places, rows, run)))  # type: ignore[misc]
            for run in _runs(places, self._write_slots)
        ]

    def close(self, deadline: float) -> bool:
        """Finishes what has started and closes the slab. A disk that hangs longer keeps its threads, not the caller."""
        readers, writers = self._readers.stop(deadline), self._writers.stop(deadline)
        # On a thread of its own: the last checkpoint is a write like any other.
        closer = threading.Thread(target=self.store.close, name="kvbm-disk-close", daemon=True)
        closer.start()
        closer.join(max(0.0, deadline - time.monotonic()))
        ended = readers and writers and not closer.is_alive()
        if not ended:
            log.error("dynamo: %s does not answer; it is left as it is", self.store.path)
        return ended

    def _read(self, places: Sequence[Place], into: Sequence[Buffer], run: list[int]) -> list[StoreError | None]:
        keys, rows = [places[position].key for position in run], [into[position] for position in run]
        try:
            return self.store.read_run(places[run[0]].slot, keys, rows)
        except StoreError as error:
            if len(run) == 1:
                return [error.with_traceback(None)]
        # One bad spot on the disk costs the blocks that lie on it, not their neighbours.
        return [self._read(places, into, [position])[0] for position in run]

    def _write(self, places: Sequence[Place], rows: Sequence[Buffer], run: list[int]) -> list[StoreError | None]:
        try:
            keys = [places[position].key for position in run]
            self.store.write_run(places[run[0]].slot, keys, [rows[position] for position in run])
        except StoreError as error:
            return [error.with_traceback(None)] * len(run)
        return [None] * len(run)


def _runs(places: Sequence[Place], most: int) -> Iterator[list[int]]:
    """Positions in `places`, grouped where their slots lie side by side, at most `most` of them."""
    run: list[int] = []
    for position in sorted(range(len(places)), key=lambda position: places[position].slot):
        if run and (len(run) == most or places[run[-1]].slot + 1 != places[position].slot):
            yield run
            run = []
        run.append(position)
    if run:
        yield run
