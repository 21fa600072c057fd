"""Compressed copies between HBM pages and rows: quantised on the way down, dequantised on the way back.

On the CPU the torch reference does both. On a GPU rows cross PCIe whole, by the copy engines, through two buffers in
HBM, which a kernel fills or empties. A kernel can write rows to pinned memory itself (`run`), but decode then took 21 %
longer, and 1 % beside the engines (H200, 2026-11-22).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dynamo_kernels.block_view import BlockView
from dynamo_kernels.compression import SMALLEST_SCALE, Codec, Compression, HeadLayout, compress_blocks, expand_blocks
from dynamo_kernels.dma import fragments
from dynamo_kernels.driver import copy_driver
from dynamo_kernels.errors import CopyError
from dynamo_kernels.geometry import Addresses, Band, Side
from dynamo_kernels.ids import checked_ids

#: Values a CTA quantises at a time, and the most that one group may have.
_TILE, _LARGEST_GROUP = 16 << 10, 64 << 10
#: CTAs that quantise: enough to keep up with the link, few enough to leave decode alone.
_STORE_CTAS = 16
_STAGING_BYTES = 32 << 20
#: The longest load or store of one thread.
_WORD_BYTES = 16


@dataclass(frozen=True)
class _Band:
    """Parts of one layout and one distance from page to page."""

    layout: HeadLayout
    numbers: tuple[int, ...]
    page_stride: int


@dataclass(frozen=True)
class _Table:
    """Where the parts of a band lie, and what that promises a kernel: without it every load is of one value."""

    #: (2, parts) on the device: elements from its first page, bytes from its first row part.
    offsets: Any
    #: All pages begin at multiples of so many elements, all row parts at multiples of so many bytes.
    page_at: int
    row_at: int


def refuse_large_groups(codec: Codec) -> None:
    """Raises `CopyError` for what kernels could not take in one piece."""
    for layout in codec.layouts:
        _, middle, _, width = layout.levels
        if _power_of_two(middle) * _power_of_two(width) > _LARGEST_GROUP:
            raise CopyError(f"groups of {middle * width} values are too large to compress; scale more dimensions")


class CompressedCopy:
    """Either direction between one set of pages and one set of compressed rows: one call at a time, by any thread."""

    def __init__(self, codec: Codec, pages: BlockView, rows: BlockView) -> None:
        codec.check_views(pages, rows)
        refuse_large_groups(codec)
        self._codec, self._pages, self._rows = codec, pages, rows
        alike: dict[tuple[HeadLayout, int], list[int]] = {}
        for number, (layout, part) in enumerate(zip(codec.layouts, pages.parts, strict=True)):
            alike.setdefault((layout, part.stride(0)), []).append(number)
        self._bands = [_Band(layout, tuple(numbers), stride) for (layout, stride), numbers in alike.items()]
        #: Part offsets of every band by where the rows' parts lie: rows of one staging buffer are alike.
        self._tables: dict[tuple[int, ...], list[_Table]] = {}
        #: Rows on their way through HBM; one load at a time has them.
        self._staging: list[BlockView] = []
        #: Behind the last call's use of them.
        self._staging_free: Any = None
        self._lock = threading.Lock()

    def store(self, page_ids: Sequence[int], row_ids: Sequence[int]) -> None:
        """Compresses pages into rows. The bytes are in place when it returns."""
        if self._pages.device.type == "cpu":
            compress_blocks(self._codec, self._pages, page_ids, self._rows, row_ids)
            return
        from_ids, to_ids = checked_ids(self._pages.num_blocks, page_ids, self._rows.num_blocks, row_ids)
        self._through_hbm(from_ids, to_ids, loads=False)

    def load(self, row_ids: Sequence[int], page_ids: Sequence[int]) -> None:
        """Expands rows into pages. The pages are in place when it returns."""
        if self._pages.device.type == "cpu":
            expand_blocks(self._codec, self._rows, row_ids, self._pages, page_ids)
            return
        from_ids, to_ids = checked_ids(self._rows.num_blocks, row_ids, self._pages.num_blocks, page_ids)
        self._through_hbm(to_ids, from_ids, loads=True)

    def start_load(self, row_ids: Sequence[int], page_ids: Sequence[int]) -> bool:
        """As `load`, for what the current stream is given from now on; the host has to wait for it.

        False, and nothing is started, while another call is handing work to the GPU.
        """
        if self._pages.device.type == "cpu":
            self.load(row_ids, page_ids)
            return True
        from_ids, to_ids = checked_ids(self._rows.num_blocks, row_ids, self._pages.num_blocks, page_ids)
        if not self._lock.acquire(blocking=False):
            return False
        try:
            self._enqueue_all(to_ids, from_ids, loads=True, waits=False)
        finally:
            self._lock.release()
        return True

    def _through_hbm(self, page_ids: Addresses, row_ids: Addresses, loads: bool) -> None:
        with self._lock:
            self._enqueue_all(page_ids, row_ids, loads, waits=True)

    def _enqueue_all(self, page_ids: Addresses, row_ids: Addresses, loads: bool, waits: bool) -> None:
        if not len(page_ids):
            return
        current = torch.cuda.current_stream(self._pages.device)
        lane = torch.cuda.Stream(self._pages.device, priority=-1)
        try:
            self._enqueue(page_ids, row_ids, loads, lane, current)
        except BaseException:
            waits = True
            raise
        finally:
            # Also what was under way when the rest could not start: the caller uses its rows and pages again.
            if waits:
                try:
                    lane.synchronize()
                finally:
                    current.synchronize()

    def _enqueue(self, page_ids: Addresses, row_ids: Addresses, loads: bool, lane: Any, current: Any) -> None:
        device, rows, row_bytes = self._pages.device, self._rows.parts[0], self._codec.row_bytes
        driver = copy_driver()
        at_once = max(1, _STAGING_BYTES // row_bytes)
        if not self._staging:
            raw = [torch.empty((at_once, row_bytes), dtype=torch.uint8, device=device) for _ in range(2)]
            self._staging = [BlockView.of_rows(buffer, self._codec.part_bytes) for buffer in raw]
        numbers = np.arange(len(row_ids), dtype=np.int64) % at_once
        # All ids before the first row: between the rows they would queue for the engine that brings those.
        on_device = self._on_device(np.stack([page_ids, numbers]).astype(np.int32))
        if self._staging_free is not None:
            current.wait_event(self._staging_free)
        lane.wait_stream(current)
        first, second = (lane, current) if loads else (current, lane)
        free: list[Any] = [None, None]
        for number, start in enumerate(range(0, len(row_ids), at_once)):
            some, staging = slice(start, start + at_once), self._staging[number % 2]
            inside, host = Side((staging.parts[0].data_ptr(),), row_bytes), Side((rows.data_ptr(),), rows.stride(0))
            if free[number % 2] is not None:
                first.wait_event(free[number % 2])
            if loads:
                across = fragments(Band(row_bytes, host, inside), row_ids[some], numbers[some])
                driver.copy_fragments(across, lane.cuda_stream)
                current.wait_event(lane.record_event())
                every = int(torch.cuda.get_device_properties(device).multi_processor_count)
                self._launch("dequantise_pages", staging, on_device[:, some], every)
            else:
                self._launch("quantise_pages", staging, on_device[:, some], _STORE_CTAS)
                lane.wait_event(current.record_event())
                across = fragments(Band(row_bytes, inside, host), numbers[some], row_ids[some])
                driver.copy_fragments(across, lane.cuda_stream)
            free[number % 2] = second.record_event()
        current.wait_stream(lane)
        self._staging_free = current.record_event()

    def run(self, kernel: str, rows: BlockView, page_ids: Addresses, row_ids: Addresses, ctas: int) -> None:
        """Launches one kernel over all parts on the current stream, or in Triton's interpreter."""
        self._launch(kernel, rows, self._on_device(np.stack([page_ids, row_ids]).astype(np.int32)), ctas)

    def _launch(self, kernel: str, rows: BlockView, ids: torch.Tensor, ctas: int) -> None:
        """`ids`: (2, blocks) int32 on the device, of pages and of rows."""
        from dynamo_kernels import triton_compression

        blocks = ids.shape[1]
        for band, table in zip(self._bands, self._offsets(rows), strict=True):
            layout, first = band.layout, band.numbers[0]
            outer, middle, inner, width = layout.levels
            groups = _groups_at_once(inner, _power_of_two(middle) * _power_of_two(width))
            page_base, row_base = self._pages.parts[first], rows.parts[first]
            count = blocks * len(band.numbers) * outer * (inner // groups)
            getattr(triton_compression, kernel)[(min(ctas, count),)](
                page_base.view(layout.dtype), row_base, table.offsets[0], table.offsets[1], ids[0], ids[1],
                blocks, len(band.numbers), band.page_stride // layout.dtype.itemsize, row_base.stride(0),
                SCALES_AT=layout.scales_offset, OUTER=outer, MIDDLE=middle, INNER=inner, WIDTH=width,
                GROUPS=groups, MIDDLE_2=_power_of_two(middle), WIDTH_2=_power_of_two(width),
                FP8=self._codec.compression is Compression.FP8, SMALLEST=SMALLEST_SCALE,
                PAGE_AT=table.page_at, ROW_AT=table.row_at, num_warps=8,
            )  # fmt: skip

    def _offsets(self, rows: BlockView) -> list[_Table]:
        """Of every band, for rows of that stride whose parts lie where these do."""
        places = (rows.parts[0].stride(0), *(part.data_ptr() - rows.parts[0].data_ptr() for part in rows.parts))
        if places not in self._tables:
            self._tables[places] = [self._table_of(band, places[0], places[1:]) for band in self._bands]
        return self._tables[places]

    def _table_of(self, band: _Band, row_stride: int, places: Sequence[int]) -> _Table:
        item = band.layout.dtype.itemsize
        pages = np.asarray([self._pages.parts[number].data_ptr() for number in band.numbers], np.int64)
        pieces = np.asarray([places[number] for number in band.numbers], np.int64)
        offsets = np.stack([(pages - pages[0]) // item, pieces - pieces[0]])
        page_at = _common_multiple([*offsets[0].tolist(), band.page_stride // item], _WORD_BYTES // item)
        row_at = _common_multiple([*offsets[1].tolist(), row_stride], _WORD_BYTES)
        return _Table(self._on_device(offsets), page_at, row_at)

    def _on_device(self, table: Any) -> Any:
        tensor = torch.from_numpy(table)
        if self._pages.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._pages.device, non_blocking=True)


def _common_multiple(places: Sequence[int], most: int) -> int:
    """The largest power of two up to `most` that divides all of `places`."""
    while any(place % most for place in places):
        most //= 2
    return most


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _groups_at_once(groups: int, values: int) -> int:
    """The largest power of two that divides `groups` and fits a tile."""
    at_once = groups & -groups
    while at_once > 1 and at_once * values > _TILE:
        at_once //= 2
    return at_once
