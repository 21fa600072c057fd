"""Compressed copies between HBM pages and rows: quantised straight into pinned memory, dequantised on the way back.

On the CPU the torch reference does both. On a GPU a store writes the rows over PCIe from the kernel itself; a load
brings whole rows into HBM by the copy engines and dequantises them there.
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
#: CTAs that write compressed rows to the host: enough to be bound by the link, few enough to leave decode alone.
_STORE_CTAS = 16
_STAGING_BYTES = 32 << 20


@dataclass(frozen=True)
class _Band:
    """Parts of one layout and one distance from page to page."""

    layout: HeadLayout
    numbers: tuple[int, ...]
    page_stride: int


def refuse_large_groups(codec: Codec) -> None:
    """Raises `CopyError` for what kernels could not take in one piece."""
    for layout in codec.layouts:
        _, middle, _, width = layout.levels
        if _power_of_two(middle) * _power_of_two(width) > _LARGEST_GROUP:
            raise CopyError(f"groups of {middle * width} values are too large to compress; scale more dimensions")


class CompressedCopy:
    """Both directions between one set of pages and one set of compressed rows. May be used by many threads."""

    def __init__(self, codec: Codec, pages: BlockView, rows: BlockView) -> None:
        codec.check_views(pages, rows)
        refuse_large_groups(codec)
        self._codec, self._pages, self._rows = codec, pages, rows
        alike: dict[tuple[HeadLayout, int], list[int]] = {}
        for number, (layout, part) in enumerate(zip(codec.layouts, pages.parts, strict=True)):
            alike.setdefault((layout, part.stride(0)), []).append(number)
        self._bands = [_Band(layout, tuple(numbers), stride) for (layout, stride), numbers in alike.items()]
        #: Part offsets of every band by where the rows' parts lie: rows of one staging buffer are alike.
        self._tables: dict[tuple[int, ...], list[Any]] = {}
        #: Rows on their way through HBM; one load at a time has them.
        self._staging: list[BlockView] = []
        self._lock = threading.Lock()

    def store(self, page_ids: Sequence[int], row_ids: Sequence[int]) -> None:
        """Compresses pages into rows. The bytes are in place when it returns."""
        if self._pages.device.type == "cpu":
            compress_blocks(self._codec, self._pages, page_ids, self._rows, row_ids)
            return
        from_ids, to_ids = checked_ids(self._pages.num_blocks, page_ids, self._rows.num_blocks, row_ids)
        if len(from_ids):
            self.run("quantise_pages", self._rows, from_ids, to_ids, _STORE_CTAS)
            torch.cuda.current_stream(self._pages.device).synchronize()

    def load(self, row_ids: Sequence[int], page_ids: Sequence[int]) -> None:
        """Expands rows into pages. The pages are in place when it returns."""
        if self._pages.device.type == "cpu":
            expand_blocks(self._codec, self._rows, row_ids, self._pages, page_ids)
            return
        from_ids, to_ids = checked_ids(self._rows.num_blocks, row_ids, self._pages.num_blocks, page_ids)
        if len(from_ids):
            with self._lock:
                self._load_staged(from_ids, to_ids)
                torch.cuda.current_stream(self._pages.device).synchronize()

    def _load_staged(self, row_ids: Addresses, page_ids: Addresses) -> None:
        device, rows, row_bytes = self._pages.device, self._rows.parts[0], self._codec.row_bytes
        current, multiprocessors = torch.cuda.current_stream(device), torch.cuda.get_device_properties(device)
        lane, driver = torch.cuda.Stream(device, priority=-1), copy_driver()
        at_once = max(1, _STAGING_BYTES // row_bytes)
        if not self._staging:
            raw = [torch.empty((at_once, row_bytes), dtype=torch.uint8, device=device) for _ in range(2)]
            self._staging = [BlockView.of_rows(buffer, self._codec.part_bytes) for buffer in raw]
        numbers = np.arange(len(row_ids), dtype=np.int64) % at_once
        # All ids before the first row: between the rows they would queue for the engine that brings those.
        on_device = self._on_device(np.stack([page_ids, numbers]).astype(np.int32))
        lane.wait_stream(current)
        free: list[Any] = [None, None]
        for number, start in enumerate(range(0, len(row_ids), at_once)):
            some, staging = slice(start, start + at_once), self._staging[number % 2]
            if free[number % 2] is not None:
                lane.wait_event(free[number % 2])
            inside = Side((staging.parts[0].data_ptr(),), row_bytes)
            across = Band(row_bytes, Side((rows.data_ptr(),), rows.stride(0)), inside)
            driver.copy_fragments(fragments(across, row_ids[some], numbers[some]), lane.cuda_stream)
            current.wait_event(lane.record_event())
            self._launch("dequantise_pages", staging, on_device[:, some], int(multiprocessors.multi_processor_count))
            free[number % 2] = current.record_event()

    def run(self, kernel: str, rows: BlockView, page_ids: Addresses, row_ids: Addresses, ctas: int) -> None:
        """Launches one kernel over all parts on the current stream, or in Triton's interpreter."""
        self._launch(kernel, rows, self._on_device(np.stack([page_ids, row_ids]).astype(np.int32)), ctas)

    def _launch(self, kernel: str, rows: BlockView, ids: torch.Tensor, ctas: int) -> None:
        """`ids`: (2, blocks) int32 on the device, of pages and of rows."""
        from dynamo_kernels import triton_compression

        blocks = ids.shape[1]
        for band, offsets in zip(self._bands, self._offsets(rows), strict=True):
            layout, first = band.layout, band.numbers[0]
            outer, middle, inner, width = layout.levels
            groups = _groups_at_once(inner, _power_of_two(middle) * _power_of_two(width))
            page_base, row_base = self._pages.parts[first], rows.parts[first]
            count = blocks * len(band.numbers) * outer * (inner // groups)
            getattr(triton_compression, kernel)[(min(ctas, count),)](
                page_base.view(layout.dtype), row_base, offsets[0], offsets[1], ids[0], ids[1],
                blocks, len(band.numbers), band.page_stride // layout.dtype.itemsize, row_base.stride(0),
                SCALES_AT=layout.scales_offset, OUTER=outer, MIDDLE=middle, INNER=inner, WIDTH=width,
                GROUPS=groups, MIDDLE_2=_power_of_two(middle), WIDTH_2=_power_of_two(width),
                FP8=self._codec.compression is Compression.FP8, SMALLEST=SMALLEST_SCALE, num_warps=8,
            )  # fmt: skip

    def _offsets(self, rows: BlockView) -> list[Any]:
        """(2, parts) of every band: elements from its first page, bytes from its first row part."""
        places = tuple(part.data_ptr() - rows.parts[0].data_ptr() for part in rows.parts)
        if places not in self._tables:
            self._tables[places] = [self._on_device(self._offsets_of(band, places)) for band in self._bands]
        return self._tables[places]

    def _offsets_of(self, band: _Band, places: tuple[int, ...]) -> Any:
        pages = np.asarray([self._pages.parts[number].data_ptr() for number in band.numbers], np.int64)
        pieces = np.asarray([places[number] for number in band.numbers], np.int64)
        return np.stack([(pages - pages[0]) // band.layout.dtype.itemsize, pieces - pieces[0]])

    def _on_device(self, table: Any) -> Any:
        tensor = torch.from_numpy(table)
        if self._pages.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._pages.device, non_blocking=True)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _groups_at_once(groups: int, values: int) -> int:
    """The largest power of two that divides `groups` and fits a tile."""
    at_once = groups & -groups
    while at_once > 1 and at_once * values > _TILE:
        at_once //= 2
    return at_once
