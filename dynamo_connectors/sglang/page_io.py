"""Moves pages between a store and SGLang's host memory, several at a time. Decides nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.lanes import Lane
from dynamo_connectors.tiers.base import Buffer

logger = logging.getLogger(__name__)

#: One page in memory: the pieces that make up its row, in order. Together they are `row_bytes` long.
Page = Sequence[memoryview]
#: Requests in flight to one disk. An NVMe drive reaches its speed at a queue depth of about 8.
IO_THREADS = 8
#: A batch that takes longer is a miss, and SGLang's thread goes on: a disk that hangs may do so for ever.
DEADLINE_SECONDS = 30.0
#: How long a detach, or a server that stops, waits for a disk.
CLOSE_SECONDS = 10.0


class Work(NamedTuple):
    """A page to move: its slot in the store, its key, where it lies in memory."""

    slot: int
    key: BlockKey
    page: Page


class ReadableStore(Protocol):
    row_bytes: int

    def read(self, slot: int, key: BlockKey, into: Buffer) -> None: ...


class WritableStore(Protocol):
    row_bytes: int

    def write(self, slot: int, key: BlockKey, row: Buffer) -> None: ...


class _Batch:
    """One call. What comes after its end is ignored, and touches none of the caller's pages."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._touching = 0
        self._is_over = False
        self._reasons: dict[BlockKey, str | None] = {}

    @contextmanager
    def touching_pages(self) -> Iterator[None]:
        with self._changed:
            if self._is_over:
                raise StoreError("timeout", "the disk did not answer in time")
            self._touching += 1
        try:
            yield
        finally:
            with self._changed:
                self._touching -= 1
                self._changed.notify_all()

    def note(self, key: BlockKey, reason: str | None) -> None:
        with self._changed:
            if not self._is_over:
                self._reasons[key] = reason

    def end(self) -> dict[BlockKey, str | None]:
        """Why each page failed, or None; pages that nothing is known of are missing."""
        with self._changed:
            self._is_over = True
            self._changed.wait_for(lambda: not self._touching)
            return self._reasons


class PageMover:
    """Thread-safe. Every call returns the keys that failed, with the reason, after `seconds` at the latest."""

    def __init__(self, io_threads: int = IO_THREADS, seconds: float = DEADLINE_SECONDS) -> None:
        self._io_threads = io_threads
        self._seconds = seconds
        self._io = Lane("dynamo-kvbm-io", io_threads)
        self._local = threading.local()
        self._lock = threading.Lock()
        self._logged: set[str] = set()

    def write(self, store: WritableStore, work: Sequence[Work]) -> dict[BlockKey, str]:
        def move(item: Work, batch: _Batch) -> None:
            row = self._row(store.row_bytes, item.page)
            with batch.touching_pages():
                offset = 0
                for piece in item.page:
                    row[offset : offset + piece.nbytes] = piece
                    offset += piece.nbytes
            store.write(item.slot, item.key, row)

        return self._run(move, work)

    def read(self, store: ReadableStore, work: Sequence[Work]) -> dict[BlockKey, str]:
        """A page whose key failed is untouched."""

        def move(item: Work, batch: _Batch) -> None:
            row = self._row(store.row_bytes, item.page)
            store.read(item.slot, item.key, row)
            with batch.touching_pages():
                offset = 0
                for piece in item.page:
                    piece[:] = row[offset : offset + piece.nbytes]
                    offset += piece.nbytes

        return self._run(move, work)

    def close(self, deadline: float) -> bool:
        """Waits for transfers in flight until `deadline` (of `time.monotonic`); later ones fail as closed. Idempotent.

        False when one of them hangs: its thread is left behind.
        """
        return self._io.stop(deadline)

    def _run(self, move: Callable[[Work, _Batch], None], work: Sequence[Work]) -> dict[BlockKey, str]:
        batch = _Batch()

        def move_some(some: Iterable[Work]) -> None:
            for item in some:
                try:
                    move(item, batch)
                except StoreError as error:
                    batch.note(item.key, error.reason)
                    self._log_failure(error)
                else:
                    batch.note(item.key, None)

        parts = [work[start :: self._io_threads] for start in range(min(self._io_threads, len(work)))]
        running = {self._io.submit(lambda some=some: move_some(some)): some for some in parts}  # type: ignore[misc]
        late = futures.wait(running, self._seconds).not_done
        for future in late:
            future.cancel()
        ended = batch.end()
        # A page has failed until it is proven to have moved: an error that nobody foresaw must not read as success.
        failures = {item.key: reason for item in work if (reason := ended.get(item.key, "internal_error")) is not None}
        for future, some in running.items():
            is_unknown = [item.key for item in some if item.key not in ended]
            if future in late:
                failures.update(dict.fromkeys(is_unknown, "timeout"))
            elif future.cancelled():
                failures.update(dict.fromkeys(is_unknown, "closed"))
            elif future.exception() is not None:
                logger.error("dynamo: a transfer failed", exc_info=future.exception())
        return failures

    def _row(self, num_bytes: int, page: Page) -> memoryview:
        """One row per I/O thread: the pieces of a page lie apart in memory, its row does not."""
        given = sum(piece.nbytes for piece in page)
        if given != num_bytes:
            raise StoreError("wrong_length", f"a page has {given} bytes, the tier keeps {num_bytes}")
        row: memoryview | None = getattr(self._local, "row", None)
        if row is None or row.nbytes != num_bytes:
            row = memoryview(bytearray(num_bytes))
            self._local.row = row
        return row

    def _log_failure(self, error: StoreError) -> None:
        """Loud the first time for each reason; the counters tell the rest."""
        with self._lock:
            is_first = error.reason not in self._logged
            self._logged.add(error.reason)
        if is_first:
            logger.warning("dynamo: a page is lost and will be computed again: %s", str(error))
