"""The object_store tier below a worker's disk: whole chunks, written behind SGLang's back, read into its pages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import NamedTuple, Protocol

from dynamo_connectors.block_manager import Move, NamedTier, Source
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.config import OBJECT_STORE
from dynamo_connectors.errors import StoreError
from dynamo_connectors.lanes import Lane
from dynamo_connectors.sglang.page_io import Page, ReadableStore
from dynamo_connectors.tiers.base import Place
from dynamo_connectors.tiers.index import TierIndex
from dynamo_connectors.tiers.object import ObjectStats, ObjectStore
from dynamo_connectors.verdicts import is_damage

logger = logging.getLogger(__name__)

#: Reading a chunk back from the disk keeps up with any upload.
_THREADS = 2
#: The store ends its requests in time by itself, and counts them; this is for a thread that is late.
_SLACK_SECONDS = 0.5


class Offloaded(NamedTuple):
    """The end of a chunk's way down. `damaged` is the block that the disk gave wrong bytes for, if one did."""

    moves: Sequence[Move]
    ok: bool
    seconds: float = 0.0
    damaged: BlockKey | None = None
    #: However it ended, the store may hold the object because of it.
    sent: bool = False


class Lower(Protocol):
    """What lies below the disk, as `PageStore` uses it."""

    named: NamedTier
    min_touches: int

    def read(self, work: Sequence[tuple[Source, Page]]) -> dict[BlockKey, str]: ...
    def offload(self, moves: Sequence[Move], disk: ReadableStore, ended: Callable[[Offloaded], None]) -> None: ...
    def erase(self, chunk: BlockKey, ended: Callable[[], None]) -> None: ...
    def when_listed(self, tell: Callable[[], None]) -> None: ...
    def take_listed(self) -> list[tuple[int, BlockKey]]: ...
    def stats(self) -> ObjectStats: ...
    def forget(self) -> None: ...
    def close(self, deadline: float) -> None: ...


class ObjectTier:
    """Owns `store`: `close` closes it. Thread-safe, but for `named.index`, which is the block manager's."""

    def __init__(
        self,
        store: ObjectStore,
        capacity_chunks: int,
        min_touches: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.named = NamedTier(OBJECT_STORE, TierIndex(capacity_chunks, erases=True), store.chunk_blocks)
        self.min_touches = min_touches
        self._store = store
        self._clock = clock
        self._io = Lane("dynamo-kvbm-object", _THREADS)
        #: Chunks that the store holds already take the last places; fresh ones are given out from the first on.
        self._next_place = capacity_chunks - 1
        self._listing = store.list_chunks(capacity_chunks)

    def read(self, work: Sequence[tuple[Source, Page]]) -> dict[BlockKey, str]:
        """Fills pages within one deadline for all; returns the keys that failed, with the reason."""
        places = [Place(source.key, source.slot, source.chunk, source.row) for source, _ in work]
        rows = [self._new_row() for _ in work]
        ends = self._clock() + self._store.deadline_seconds + _SLACK_SECONDS
        failures: dict[BlockKey, str] = {}
        for batch in self._store.read(places, rows):
            errors = _wait(batch.outcome, max(0.0, ends - self._clock()), len(batch.positions))
            for position, error in zip(batch.positions, errors, strict=True):
                if error is not None:
                    failures[places[position].key] = error.reason
                    continue
                offset = 0
                for piece in work[position][1]:
                    piece[:] = rows[position][offset : offset + piece.nbytes]
                    offset += piece.nbytes
        return failures

    def offload(self, moves: Sequence[Move], disk: ReadableStore, ended: Callable[[Offloaded], None]) -> None:
        """Copies the blocks of one chunk from the disk, and uploads them. `ended` is called once, from any thread."""

        def end_if_closed(upload: Future[None]) -> None:
            if upload.cancelled():
                ended(Offloaded(moves, ok=False))

        self._io.submit(partial(self._upload, moves, disk, ended)).add_done_callback(end_if_closed)

    def erase(self, chunk: BlockKey, ended: Callable[[], None]) -> None:
        """Removes an object some time. `ended` is called once, from any thread."""
        self._store.erase([chunk]).add_done_callback(lambda _: ended())

    def when_listed(self, tell: Callable[[], None]) -> None:
        """Calls `tell`, from any thread, once everything that the store holds has been found."""
        self._listing.add_done_callback(lambda _: tell())

    def take_listed(self) -> list[tuple[int, BlockKey]]:
        """(place, chunk) of what the store was found to hold, since the last call."""
        chunks, _ = self._store.take_listed()
        entries = [(self._next_place - index, chunk) for index, chunk in enumerate(chunks)]
        self._next_place -= len(chunks)
        return [entry for entry in entries if entry[0] >= 0]

    def stats(self) -> ObjectStats:
        return self._store.stats()

    def forget(self) -> None:
        self._store.forget()

    def close(self, deadline: float) -> None:
        """Drops what waits or runs, and waits for its threads until `deadline` (of `time.monotonic`). Idempotent."""
        # First: who reads a chunk back from the disk is told that nobody takes it.
        has_ended = self._store.close(deadline)
        if not (self._io.stop(deadline) and has_ended):
            logger.warning("dynamo: the object store is still busy; its threads are left to end by themselves")

    def check(self) -> None:
        self._store.check()

    def _upload(self, moves: Sequence[Move], disk: ReadableStore, ended: Callable[[Offloaded], None]) -> None:
        started = self._clock()
        ordered = sorted(moves, key=lambda move: move.row)
        rows = []
        for move in ordered:
            row = self._new_row()
            try:
                disk.read(move.source_slot, move.key, row)
            except StoreError as error:
                ended(Offloaded(moves, ok=False, damaged=move.key if is_damage(error.reason) else None))
                return
            except BaseException:
                logger.exception("dynamo: a chunk is not uploaded")
                ended(Offloaded(moves, ok=False))
                return
            rows.append(row)
        places = [Place(move.key, move.target_slot, move.chunk, move.row) for move in ordered]
        for batch in self._store.write(places, rows):
            batch.outcome.add_done_callback(
                lambda outcome, sent=batch.sent: ended(  # type: ignore[misc]
                    Offloaded(moves, _all_well(outcome), self._clock() - started, sent=sent())
                )
            )

    def _new_row(self) -> memoryview:
        return memoryview(bytearray(self._store.row_bytes))


def _wait(outcome: Future[Sequence[StoreError | None]], seconds: float, blocks: int) -> Sequence[StoreError | None]:
    try:
        return outcome.result(seconds)
    except (futures.TimeoutError, CancelledError):  # not the built-in one before Python 3.11
        outcome.cancel()
        return [StoreError("deadline", "the object store did not answer in time")] * blocks
    except Exception as error:
        logger.exception("dynamo: a read of the object store failed")
        return [StoreError("internal_error", str(error))] * blocks


def _all_well(outcome: Future[Sequence[StoreError | None]]) -> bool:
    return not outcome.cancelled() and outcome.exception() is None and not any(outcome.result())
