"""Moves pages between a store and SGLang's host memory, several at a time. Decides nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers.base import Buffer

logger = logging.getLogger(__name__)

#: One page in memory: the pieces that make up its row, in order. Together they are `row_bytes` long.
Page = Sequence[memoryview]
#: Requests in flight to one disk. An NVMe drive reaches its speed at a queue depth of about 8.
IO_THREADS = 8


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


class PageMover:
    """Thread-safe. Every call returns the keys that failed, with the reason."""

    def __init__(self, io_threads: int = IO_THREADS) -> None:
        self._io_threads = io_threads
        self._io = ThreadPoolExecutor(io_threads, thread_name_prefix="dynamo-kvbm-io")
        self._local = threading.local()
        self._lock = threading.Lock()
        self._logged: set[str] = set()

    def write(self, store: WritableStore, work: Sequence[Work]) -> dict[BlockKey, str]:
        def move(item: Work) -> None:
            row = self._row(store.row_bytes, item.page)
            offset = 0
            for piece in item.page:
                row[offset : offset + piece.nbytes] = piece
                offset += piece.nbytes
            store.write(item.slot, item.key, row)

        return self._run(move, work)

    def read(self, store: ReadableStore, work: Sequence[Work]) -> dict[BlockKey, str]:
        """A page whose key failed is untouched."""

        def move(item: Work) -> None:
            row = self._row(store.row_bytes, item.page)
            store.read(item.slot, item.key, row)
            offset = 0
            for piece in item.page:
                piece[:] = row[offset : offset + piece.nbytes]
                offset += piece.nbytes

        return self._run(move, work)

    def close(self) -> None:
        """Waits for transfers in flight; later ones fail as closed. Idempotent."""
        self._io.shutdown(wait=True)

    def _run(self, move: Callable[[Work], None], work: Sequence[Work]) -> dict[BlockKey, str]:
        # A page has failed until it is proven to have moved: an error that nobody foresaw must not read as success.
        failures = {item.key: "internal_error" for item in work}

        def move_some(some: Iterable[Work]) -> None:
            for item in some:
                try:
                    move(item)
                except StoreError as error:
                    failures[item.key] = error.reason
                    self._log_failure(error)
                else:
                    failures.pop(item.key, None)

        futures: list[Future[None]] = []
        for start in range(min(self._io_threads, len(work))):
            some = work[start :: self._io_threads]
            try:
                futures.append(self._io.submit(move_some, some))
            except RuntimeError:
                failures.update({item.key: "closed" for item in some})
        for future in futures:
            error = future.exception()
            if error is not None:
                logger.error("dynamo: a transfer failed", exc_info=error)
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
