"""Brings blocks of a tier below host memory up to HBM, through staging rows, reading and copying at the same time."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from typing import Any, NamedTuple, Protocol

from dynamo_kernels.fence import CopyLane

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.jobs import LoadItem
from dynamo_connectors.staging import StagingRows
from dynamo_connectors.tiers.base import Batch, Place

log = logging.getLogger(__name__)

#: Rows of one read, and that one load may hold if its tier does not want more: enough to keep a disk busy, few enough
#: that several loads share them.
MOST_ROWS = 16


class _Read(NamedTuple):
    items: list[LoadItem]
    rows: list[int]
    given_up: Future[str] | None = None


class Reads(Protocol):
    """What a load needs of a tier (`tiers.base.LowerTier`), of whatever its staging rows are as buffers."""

    def read(self, places: Sequence[Place], into: Sequence[Any]) -> list[Batch]: ...


class LoadFromBelow:
    """One load from one tier, on a thread of the transfer engine."""

    def __init__(
        self, tier: Reads, staging: StagingRows, most_rows: int = MOST_ROWS, rows_of_a_read: int = MOST_ROWS
    ) -> None:
        self._most_rows, self._rows_of_a_read = most_rows, rows_of_a_read
        self._tier = tier
        self._staging = staging
        self._reads: dict[Future[Sequence[StoreError | None]], _Read] = {}

    def run(self, items: Sequence[LoadItem], seconds: float, failed: dict[BlockKey, str]) -> int:
        """Fills the HBM blocks of `items`; notes in `failed` why one was not. Returns how many were.

        What takes longer than `seconds` is a miss: the request would rather be computed.
        However it ends, no read of this load can reach memory that somebody else uses by then.
        """
        deadline = time.monotonic() + seconds
        waiting, good = list(items), 0
        try:
            while (waiting or self._reads) and time.monotonic() < deadline:
                del waiting[: self._start(waiting, deadline)]
                signals: list[Future[Any]] = [*self._reads]
                signals += [read.given_up for read in self._reads.values() if read.given_up is not None]
                done = wait(signals, max(0.0, deadline - time.monotonic()), FIRST_COMPLETED).done
                good += self._finish({outcome for outcome in self._reads if outcome in done}, failed)
                self._give_up(failed)
            late = [item for read in self._reads.values() for item in read.items]
            failed.update({item.key: "timeout" for item in [*late, *waiting]})
        finally:
            self._leave_behind()
        return good

    def _start(self, waiting: Sequence[LoadItem], deadline: float) -> int:
        """Starts reading the first of `waiting`, as many as there are rows for."""
        room = self._most_rows - sum(len(read.rows) for read in self._reads.values())
        # Who holds rows does not wait for more, so those who wait are served in the end.
        patience = 0.0 if self._reads else max(0.0, deadline - time.monotonic())
        rows = self._staging.take(min(room, len(waiting)), patience) if waiting and room else []
        size = self._rows_of_a_read
        for first in range(0, len(rows), size):
            items, part = waiting[first : first + size], rows[first : first + size]
            places = [Place(item.key, item.slot, item.chunk, item.row) for item in items[: len(part)]]
            for batch in self._tier.read(places, [self._staging.view(row) for row in part]):
                mine, rows_of_it = [items[at] for at in batch.positions], [part[at] for at in batch.positions]
                self._reads[batch.outcome] = _Read(mine, rows_of_it, batch.given_up)
        return len(rows)

    def _finish(self, done: set[Future[Sequence[StoreError | None]]], failed: dict[BlockKey, str]) -> int:
        reads = {outcome: self._reads.pop(outcome) for outcome in done}
        rows: list[int] = []
        blocks: list[int] = []
        try:
            for outcome, read in reads.items():
                for item, row, reason in zip(read.items, read.rows, reasons(outcome, len(read.items)), strict=True):
                    if reason is None:
                        rows.append(row)
                        blocks.append(item.block)
                    else:
                        failed[item.key] = reason
            with CopyLane(self._staging.copy.device):
                self._staging.copy.up(rows, blocks)
        finally:
            for read in reads.values():
                self._staging.give(read.rows)
        return len(rows)

    def _give_up(self, failed: dict[BlockKey, str]) -> None:
        """Reads that their tier expects nothing of any more."""
        for outcome, read in list(self._reads.items()):
            if read.given_up is not None and read.given_up.done():
                failed.update(dict.fromkeys((item.key for item in read.items), read.given_up.result()))
                self._abandon(outcome, self._reads.pop(outcome))

    def _leave_behind(self) -> None:
        for outcome, read in self._reads.items():
            self._abandon(outcome, read)

    def _abandon(self, outcome: Future[Sequence[StoreError | None]], read: _Read) -> None:
        """Rows of a read that is late come back when it has ended, if ever."""
        outcome.cancel()
        outcome.add_done_callback(lambda _, rows=read.rows: self._staging.give(rows))  # type: ignore[misc]


#: What a tier never had or has no more, and a peer who was refused in a line of its own, are nothing to look into.
_KNOWN = ("tier_off", "gone", "refused")


def reasons(done: Future[Sequence[StoreError | None]], blocks: int) -> list[str | None]:
    """Why each block of a finished batch failed, or None."""
    try:
        errors = done.result()
    except CancelledError:
        return ["closed"] * blocks
    except BaseException:
        log.exception("dynamo: a transfer of %d blocks failed; they are treated as a miss", blocks)
        return ["internal_error"] * blocks
    first = next((error for error in errors if error is not None and error.reason not in _KNOWN), None)
    if first is not None:
        log.warning("dynamo: %d blocks were not transferred, the first one: %s", sum(map(bool, errors)), first)
    return [None if error is None else error.reason for error in errors]
