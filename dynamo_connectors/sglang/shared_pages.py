"""Pages of a pool that another rank of this host writes: looked up and read, never written."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import takewhile

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.sglang import page_io
from dynamo_connectors.sglang.page_io import Page, PageMover, Work
from dynamo_connectors.sglang.page_store import PageCounts, Transfer, Watcher
from dynamo_connectors.sglang.shared_slab import SharedSlabs

logger = logging.getLogger(__name__)


class SharedPages:
    """Owns `slabs`. After a change of weights it serves nothing any more: it cannot tell new pages from old ones."""

    def __init__(
        self,
        name: str,
        slabs: SharedSlabs,
        watcher: Watcher | None = None,
        mover: PageMover | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._slabs = slabs
        self._watcher = watcher or Watcher()
        self._mover = mover or PageMover()
        self._clock = clock
        self._lock = threading.Lock()
        self._serves = True
        self._load_failures: Counter[str] = Counter()
        self._asked_pages = 0
        self._read_pages = 0

    def note_use(self, chain: Sequence[BlockKey]) -> None:
        """The rank that writes is asked the same, and notes it."""

    def match(self, keys: Sequence[BlockKey], before: Sequence[BlockKey] | None = ()) -> int:
        with self._lock:
            self._asked_pages += len(keys)
        return sum(1 for _ in takewhile(bool, self.present(keys)))

    def present(self, keys: Sequence[BlockKey]) -> list[bool]:
        return self._slabs.match(keys) if self._serves else [False] * len(keys)

    def put(
        self, keys: Sequence[BlockKey], pages: Sequence[Page], before: Sequence[BlockKey] | None = ()
    ) -> list[bool]:
        """Not this rank's to write."""
        return [False] * len(keys)

    def get(self, keys: Sequence[BlockKey], pages: Sequence[Page], before: Sequence[BlockKey] = ()) -> list[bool]:
        """Fills the leading run of `pages` that can be read; a page answered False is untouched or worthless."""
        run = sum(1 for _ in takewhile(bool, self.present(keys)))
        started = self._clock()
        leading = zip(keys[:run], pages, strict=False)
        failures = self._mover.read(self._slabs, [Work(0, key, page) for key, page in leading])
        read = run - len(failures)
        with self._lock:
            self._read_pages += read
            self._load_failures.update(failures.values())
            is_trusted = self._serves
        if read:
            num_bytes = read * self._slabs.row_bytes
            self._watcher.on_transfer(Transfer(self._name, True, read, num_bytes, self._clock() - started))
        return [is_trusted and index < run and key not in failures for index, key in enumerate(keys)]

    def suspend(self) -> None:
        with self._lock:
            was_serving, self._serves = self._serves, False
        if was_serving:
            logger.warning(
                "dynamo: weights have changed; this rank reads no KV from the %s tier until the server is restarted",
                self._name,
            )

    def resume(self) -> None:
        """Nothing: see the class."""

    def clear(self) -> None:
        """The rank that writes clears."""

    def counts(self) -> PageCounts:
        with self._lock:
            return PageCounts(self._asked_pages, self._read_pages, 0, {}, dict(self._load_failures), 0, 0, 0)

    def lower_counts(self) -> dict[str, PageCounts]:
        return {}

    def close(self, deadline: float | None = None) -> None:
        with self._lock:
            self._serves = False
        self._mover.close(time.monotonic() + page_io.CLOSE_SECONDS if deadline is None else deadline)
        self._slabs.close()

    def check(self) -> None:
        self._slabs.check()
        assert self._read_pages >= 0, "the count of pages read is negative"
