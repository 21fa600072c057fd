"""The rows in HBM that peers read from, and the threads that fill them from host memory (`transport.window_desk`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from dynamo_kernels.block_view import BlockView
from dynamo_kernels.fence import CopyLane

from dynamo_connectors.hbm_rows import HbmRows
from dynamo_connectors.lanes import Lane
from dynamo_connectors.row_copy import RowCopy
from dynamo_connectors.tiers.dram import DramStore

log = logging.getLogger(__name__)

#: Fills that run at a time: while one is being prepared another one keeps the bus busy.
_FILLS_AT_A_TIME = 2
_CLOSE_SECONDS = 5.0


class Window:
    def __init__(self, host: DramStore, rows: HbmRows) -> None:
        self.rows = rows
        self._copy = RowCopy(BlockView((rows.rows,)), host.rows)
        self._lane = Lane("kvbm-window", _FILLS_AT_A_TIME)

    def fill(self, slots: Sequence[int], rows: Sequence[int], then: Callable[[bool], None]) -> None:
        """Copies host slots to rows; `then` is told, on a thread of ours, whether the bytes are there."""
        self._lane.submit(partial(self._fill, slots, rows)).add_done_callback(partial(_tell, then))

    def close(self) -> bool:
        """False when the thread did not end in time; what it uses stays then."""
        if not self._lane.stop(time.monotonic() + _CLOSE_SECONDS):
            return False
        del self._copy
        self.rows.close()
        return True

    def _fill(self, slots: Sequence[int], rows: Sequence[int]) -> None:
        with CopyLane(self._copy.device):  # complete when it ends: NIXL reads outside of any stream
            self._copy.up(slots, rows)


def _tell(then: Callable[[bool], None], done: Future[None]) -> None:
    error = None if done.cancelled() else done.exception()
    if error is not None:
        log.error("dynamo: rows for a peer could not be filled; it reads host memory", exc_info=error)
    then(not done.cancelled() and error is None)
