"""Pages of one worker on one tier: a block manager that decides, a store that keeps, threads that move.

SGLang calls from several threads. One lock guards the decisions; bytes move outside it, under a lease or a reservation.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from dynamo_connectors.block_manager import BlockManager, NamedTier
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers.base import TierStore
from dynamo_connectors.tiers.index import TierIndex

logger = logging.getLogger(__name__)

#: One page in memory: the pieces that make up its row, in order. Together they are `row_bytes` long.
Page = Sequence[memoryview]
#: Requests in flight to one disk. An NVMe drive reaches its speed at a queue depth of about 8.
IO_THREADS = 8
#: Transfers remembered between two calls of `take_transfers`.
_MAX_TRANSFERS = 1024


#: A page to move: slot, key, where it lies in memory.
Work = tuple[int, BlockKey, Page]
Move = Callable[[int, BlockKey, Page], None]


class Transfer(NamedTuple):
    """One batch that moved bytes."""

    is_read: bool
    pages: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class PageCounts:
    """Totals since the start, and what the tier holds now.

    `dropped` (not kept, or no longer) and `load_failures` (gave no bytes) are by reason; a damaged page is in both.
    """

    read_pages: int
    written_pages: int
    dropped: dict[str, int]
    load_failures: dict[str, int]
    ready_pages: int
    capacity_pages: int
    evicted_pages: int


class PageStore:
    """Owns `store`: `close` closes it. `clock` gives seconds."""

    def __init__(
        self, name: str, store: TierStore, io_threads: int = IO_THREADS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._manager = BlockManager([NamedTier(name, TierIndex(store.capacity_blocks))])
        self._clock = clock
        self._lock = threading.Lock()
        self._local = threading.local()
        self._io_threads = io_threads
        self._io = ThreadPoolExecutor(io_threads, thread_name_prefix="dynamo-kvbm-io")
        self._is_open = True
        self._is_suspended = False
        self._load_failures: Counter[str] = Counter()
        self._logged: set[str] = set()
        self._read_pages = 0
        self._written_pages = 0
        self._transfers: deque[Transfer] = deque(maxlen=_MAX_TRANSFERS)

    def match(self, keys: Sequence[BlockKey]) -> int:
        """Length of the leading run of `keys` that can be read now."""
        with self._lock:
            if not self._serves:
                return 0
            return self._manager.match(keys)

    def put(self, keys: Sequence[BlockKey], pages: Sequence[Page]) -> list[bool]:
        """Keeps pages; True for each one that is here (or on its way here by another thread) afterwards."""
        page_of = dict(zip(keys, pages, strict=True))
        with self._lock:
            if not self._serves:
                return [False] * len(keys)
            # The head of the chain is leased so that its own tail cannot push it out.
            held = self._manager.lease(list(page_of))
            targets = self._manager.reserve(page_of)
        started = self._clock()
        failures = self._run(self._write, [(target.slot, target.key, page_of[target.key]) for target in targets])
        with self._lock:
            for target in targets:
                reason = failures.get(target.key)
                if reason is None:
                    self._manager.commit(target)
                else:
                    self._manager.abort(target, reason)
            self._manager.release(held)
            self._manager.take_changes()
            written = len(targets) - len(failures)
            self._written_pages += written
            self._note(failures, Transfer(False, written, written * self._store.row_bytes, self._clock() - started))
            index = self._manager.tiers[0].index
            return [index.is_known(key) for key in keys]

    def get(self, keys: Sequence[BlockKey], pages: Sequence[Page]) -> list[bool]:
        """Fills the leading run of `pages` that can be read; a page answered False is untouched or worthless."""
        with self._lock:
            if not self._serves:
                return [False] * len(keys)
            sources = self._manager.lease(keys)
        started = self._clock()
        # A prefix is all that can be used, and only its pages are leased.
        leased = zip(sources, pages, strict=False)
        failures = self._run(self._read, [(source.slot, source.key, page) for source, page in leased])
        with self._lock:
            self._manager.release(sources, failures.keys())
            self._manager.take_changes()
            read = len(sources) - len(failures)
            self._read_pages += read
            self._note(failures, Transfer(True, read, read * self._store.row_bytes, self._clock() - started))
        return [index < len(sources) and key not in failures for index, key in enumerate(keys)]

    def suspend(self) -> None:
        """From now on nothing is kept and nothing is served, until `resume`."""
        with self._lock:
            self._is_suspended = True
            self._manager.clear()
            self._manager.take_changes()

    def resume(self) -> None:
        with self._lock:
            if self._is_suspended:
                self._manager.clear()
                self._manager.take_changes()
                self._is_suspended = False

    def clear(self) -> None:
        """Forgets every page. Transfers in flight end in peace and are not kept."""
        with self._lock:
            self._manager.clear()
            self._manager.take_changes()

    def counts(self) -> PageCounts:
        with self._lock:
            (stats,) = self._manager.stats().values()
            return PageCounts(
                read_pages=self._read_pages,
                written_pages=self._written_pages,
                dropped=dict(self._manager.dropped),
                load_failures=dict(self._load_failures),
                ready_pages=stats.ready_blocks,
                capacity_pages=stats.capacity_blocks,
                evicted_pages=stats.evicted_blocks_total,
            )

    def take_transfers(self) -> list[Transfer]:
        """What moved since the last call."""
        with self._lock:
            transfers = list(self._transfers)
            self._transfers.clear()
            return transfers

    def close(self) -> None:
        """Waits for transfers in flight, then gives everything back. Idempotent."""
        with self._lock:
            self._is_open = False
        self._io.shutdown(wait=True)
        self._store.close()

    def check(self) -> None:
        """Asserts every invariant. O(capacity)."""
        with self._lock:
            self._manager.check()
            assert self._read_pages >= 0, "the count of pages read is negative"
            assert not self._manager.has_spills_waiting, "a single tier has nowhere to spill to"

    @property
    def _serves(self) -> bool:
        return self._is_open and not self._is_suspended

    def _run(self, move: Move, work: Sequence[Work]) -> dict[BlockKey, str]:
        """Moves every page on the I/O threads; returns the keys that failed, with the reason."""
        # A page has failed until it is proven to have moved: an error that nobody foresaw must not read as success.
        failures = {key: "internal_error" for _, key, _ in work}

        def move_some(some: Iterable[Work]) -> None:
            for slot, key, page in some:
                try:
                    move(slot, key, page)
                except StoreError as error:
                    failures[key] = error.reason
                    self._log_failure(error)
                else:
                    failures.pop(key, None)

        futures: list[Future[None]] = []
        for start in range(min(self._io_threads, len(work))):
            chunk = work[start :: self._io_threads]
            try:
                futures.append(self._io.submit(move_some, chunk))
            except RuntimeError:
                failures.update({key: "closed" for _, key, _ in chunk})
        for future in futures:
            error = future.exception()
            if error is not None:
                logger.error("dynamo: a transfer failed", exc_info=error)
        return failures

    def _write(self, slot: int, key: BlockKey, page: Page) -> None:
        self._expect_full(page)
        row = self._row()
        offset = 0
        for piece in page:
            row[offset : offset + piece.nbytes] = piece
            offset += piece.nbytes
        self._store.write(slot, key, row)

    def _read(self, slot: int, key: BlockKey, page: Page) -> None:
        self._expect_full(page)
        row = self._row()
        self._store.read(slot, key, row)
        offset = 0
        for piece in page:
            piece[:] = row[offset : offset + piece.nbytes]
            offset += piece.nbytes

    def _expect_full(self, page: Page) -> None:
        num_bytes = sum(piece.nbytes for piece in page)
        if num_bytes != self._store.row_bytes:
            raise StoreError("wrong_length", f"a page has {num_bytes} bytes, the tier keeps {self._store.row_bytes}")

    def _row(self) -> memoryview:
        """One row per I/O thread: the pieces of a page lie apart in memory, its row does not."""
        row: memoryview | None = getattr(self._local, "row", None)
        if row is None:
            row = memoryview(bytearray(self._store.row_bytes))
            self._local.row = row
        return row

    def _note(self, failures: dict[BlockKey, str], transfer: Transfer) -> None:
        if transfer.is_read:
            self._load_failures.update(failures.values())
        if transfer.pages:
            self._transfers.append(transfer)

    def _log_failure(self, error: StoreError) -> None:
        """Loud the first time for each reason; the counters tell the rest."""
        with self._lock:
            is_first = error.reason not in self._logged
            self._logged.add(error.reason)
        if is_first:
            logger.warning("dynamo: a page is lost and will be computed again: %s", str(error))
