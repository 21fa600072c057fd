"""Rows that bytes pass through on their way up, of host memory or HBM. Their number bounds what loads may take."""

from __future__ import annotations

import threading

from dynamo_kernels.block_view import BlockView
from dynamo_kernels.compression import Codec

from dynamo_connectors.hbm_rows import HbmRows
from dynamo_connectors.row_copy import RowCopy
from dynamo_connectors.tiers.base import Buffer
from dynamo_connectors.tiers.dram import DramStore


class StagingRows:
    """Hands out rows of `store`, which it owns. A row is given back by whoever is sure that nobody writes to it."""

    def __init__(self, store: DramStore | HbmRows, hbm: BlockView, codec: Codec | None = None) -> None:
        self.store = store
        #: From these rows on to HBM.
        self.copy = RowCopy(hbm, store.rows, codec)
        self._free = list(range(store.capacity_blocks))
        self._changed = threading.Condition()

    def take(self, most: int, wait_seconds: float = 0.0) -> list[int]:
        """Up to `most` rows; none when none came free in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._free, wait_seconds)
            taken, self._free = self._free[:most], self._free[most:]
            return taken

    def give(self, rows: list[int]) -> None:
        with self._changed:
            self._free = sorted(self._free + rows)  # neighbours are read as one
            self._changed.notify_all()

    def view(self, row: int) -> Buffer | int:
        """What a tier reads into."""
        return self.store.buffer(row)

    def close(self) -> None:
        del self.copy
        self.store.close()

    def check(self) -> None:
        with self._changed:
            assert len(set(self._free)) == len(self._free), "a staging row was given back twice"
            assert set(self._free) <= set(range(self.store.capacity_blocks)), "a staging row that does not exist"
