"""Copies between HBM pages and one slab of rows: as they are, or compressed on the way down and expanded going up.

A slab holds one kind of rows for its whole life, and every tier below holds copies of them, so a process never meets
both kinds; that another one's are not met on disk or in an object store is the namespace's work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from dynamo_kernels.block_view import BlockView
from dynamo_kernels.compressed_copy import CompressedCopy
from dynamo_kernels.compression import Codec
from dynamo_kernels.copy import copy_blocks, start_copy
from dynamo_kernels.layered import LayeredCopy, prepare_layers


class RowCopy:
    """`rows` is (slots, row_bytes) uint8, in host memory or beside the pages in HBM.

    The bytes are in place when a call returns. Many threads may call at once.
    """

    def __init__(self, hbm: BlockView, rows: npt.NDArray[np.uint8] | torch.Tensor, codec: Codec | None = None) -> None:
        self._hbm = hbm
        # One view for good, because the copy engine prepares a plan for every new one.
        self._rows = BlockView.of_rows(torch.as_tensor(rows), hbm.part_bytes if codec is None else codec.part_bytes)
        # One a direction: a load has its own buffers, and never waits behind a job that stores.
        self._storing = None if codec is None else CompressedCopy(codec, hbm, self._rows)
        self._loading = None if codec is None else CompressedCopy(codec, hbm, self._rows)
        self._layered: LayeredCopy | None = None

    @property
    def device(self) -> torch.device:
        return self._hbm.device

    def start_down(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        """Returns while the copy is under way on the current stream, unless it compresses."""
        if not blocks:
            return
        if self._storing is None:
            start_copy(self._hbm, blocks, self._rows, slots)
        else:
            self._storing.store(blocks, slots)

    def up(self, slots: Sequence[int], blocks: Sequence[int]) -> None:
        if not slots:  # every block of a batch was a miss
            return
        if self._loading is None:
            copy_blocks(self._rows, slots, self._hbm, blocks)
        else:
            self._loading.load(slots, blocks)

    def start_up(self, slots: Sequence[int], blocks: Sequence[int]) -> bool:
        """As `up`, for the current stream only: what that is given from now on sees the bytes.

        False, and nothing is started, where the host would wait for another call.
        """
        if self._loading is not None:
            return self._loading.start_load(slots, blocks)
        start_copy(self._rows, slots, self._hbm, blocks)
        return True

    def prepare_layers(self) -> None:
        """Before any block means anything; without it every load arrives at once."""
        if self._loading is None:
            self._layered = prepare_layers(self._rows, self._hbm)

    def by_layers(self, slots: Sequence[int], blocks: Sequence[int]) -> list[Callable[[], None]]:
        """`start_up` in parts, to be called in order: none where the load had better arrive at once."""
        return [] if self._layered is None else self._layered.copies(slots, blocks)
