"""The object_store tier below a worker's disk: whole chunks, written behind SGLang's back, read into its pages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple, Protocol

from dynamo_connectors.block_manager import Move, NamedTier, Source
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.config import OBJECT_STORE
from dynamo_connectors.errors import StoreError
from dynamo_connectors.sglang.page_io import Page, ReadableStore
from dynamo_connectors.tiers.index import TierIndex
from dynamo_connectors.tiers.object import ObjectStore, RowRead

logger = logging.getLogger(__name__)

#: Reading a chunk back from the disk keeps up with any upload.
_THREADS = 2


class Offloaded(NamedTuple):
    """The end of a chunk's way down. `damaged` is the block that the disk gave wrong bytes for, if one did."""

    moves: Sequence[Move]
    ok: bool
    damaged: BlockKey | None = None


class Lower(Protocol):
    """What lies below the disk, as `PageStore` uses it."""

    named: NamedTier
    min_touches: int

    def read(self, work: Sequence[tuple[Source, Page]]) -> dict[BlockKey, str]: ...
    def offload(self, moves: Sequence[Move], disk: ReadableStore, ended: Callable[[Offloaded], None]) -> None: ...
    def erase(self, chunk: BlockKey) -> None: ...
    def take_listed(self) -> list[tuple[int, BlockKey]]: ...
    def forget(self) -> None: ...
    def close(self) -> None: ...


class ObjectTier:
    """Owns `store`: `close` closes it. Thread-safe, but for `named.index`, which is the block manager's."""

    def __init__(
        self,
        store: ObjectStore,
        capacity_chunks: int,
        min_touches: int,
        deadline_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.named = NamedTier(OBJECT_STORE, TierIndex(capacity_chunks, erases=True), store.chunk_blocks)
        self.min_touches = min_touches
        self._store = store
        self._deadline_seconds = deadline_seconds
        self._clock = clock
        self._io = ThreadPoolExecutor(_THREADS, thread_name_prefix="dynamo-kvbm-object")
        #: Chunks that the store holds already take the last places; fresh ones are given out from the first on.
        self._next_place = capacity_chunks - 1
        store.list_chunks(capacity_chunks)

    def read(self, work: Sequence[tuple[Source, Page]]) -> dict[BlockKey, str]:
        """Fills pages, chunk by chunk, within one deadline for all; returns the keys that failed, with the reason."""
        deadline = self._clock() + self._deadline_seconds
        failures: dict[BlockKey, str] = {}
        for chunk, together in groupby(work, key=lambda item: item[0].chunk):
            items = list(together)
            rows = [RowRead(source.row, source.key, self._new_row()) for source, _ in items]
            try:
                assert chunk is not None, "an object has no name"
                self._store.read_rows(chunk, rows, deadline)
            except StoreError as error:
                failures.update((source.key, error.reason) for source, _ in items)
                continue
            for (_, page), row in zip(items, rows, strict=True):
                offset = 0
                for piece in page:
                    piece[:] = row.into[offset : offset + piece.nbytes]
                    offset += piece.nbytes
        return failures

    def offload(self, moves: Sequence[Move], disk: ReadableStore, ended: Callable[[Offloaded], None]) -> None:
        """Copies the blocks of one chunk from the disk, and uploads them. `ended` is called once, from any thread."""
        try:
            self._io.submit(self._upload, moves, disk, ended)
        except RuntimeError:  # closed
            ended(Offloaded(moves, ok=False))

    def erase(self, chunk: BlockKey) -> None:
        self._store.delete_chunk(chunk)

    def take_listed(self) -> list[tuple[int, BlockKey]]:
        """(place, chunk) of what the store was found to hold, since the last call."""
        chunks, _ = self._store.take_listed()
        entries = [(self._next_place - index, chunk) for index, chunk in enumerate(chunks)]
        self._next_place -= len(chunks)
        return [entry for entry in entries if entry[0] >= 0]

    def forget(self) -> None:
        self._store.forget()

    def close(self) -> None:
        """Drops what waits or runs. Idempotent."""
        self._io.shutdown(wait=True, cancel_futures=False)
        self._store.close()

    def check(self) -> None:
        self._store.check()

    def _upload(self, moves: Sequence[Move], disk: ReadableStore, ended: Callable[[Offloaded], None]) -> None:
        ordered = sorted(moves, key=lambda move: move.row)
        rows = []
        for move in ordered:
            row = self._new_row()
            try:
                disk.read(move.source_slot, move.key, row)
            except StoreError:
                ended(Offloaded(moves, ok=False, damaged=move.key))
                return
            rows.append(row)
        chunk = ordered[-1].key
        try:
            self._store.put_chunk(
                chunk, [move.key for move in ordered], rows, lambda error: ended(Offloaded(moves, ok=error is None))
            )
        except Exception:
            logger.exception("dynamo: a chunk could not be handed to the object store")
            ended(Offloaded(moves, ok=False))

    def _new_row(self) -> memoryview:
        return memoryview(bytearray(self._store.row_bytes))
