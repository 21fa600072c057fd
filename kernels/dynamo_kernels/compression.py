"""FP8 and INT8 KV with one scale per (layer, head, block): the layout of a compressed row, and the torch reference.

A compressed part is its page's elements, one byte each and in the page's own order, then its scales (float32). This is
the only place where anything of ours looks inside a page, so the caller states what is there (`HeadLayout`) and
whatever cannot be stated is refused.

Error of one value x, in a group whose largest magnitude is m, before the rounding to the page's own dtype:
FP8 (e4m3): |error| <= max(|x| / 16, m / 448 / 1024) * (1 + 2**-20); INT8: |error| <= m / 254 * (1 + 2**-20).
A group that holds a NaN or an infinity comes back as NaN, all of it: garbage stays visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod

import torch

from dynamo_kernels.block_view import BlockView
from dynamo_kernels.errors import CopyError
from dynamo_kernels.ids import checked_ids

#: A part of a row starts and ends on this boundary, so that 16-byte loads and stores work everywhere.
_ALIGN_BYTES = 16
_SCALE_BYTES = 4
#: Below this a group is zeros for every purpose; its reciprocal would be infinite.
SMALLEST_SCALE = 2.0**-120


class Compression(Enum):
    """The one-byte formats. The value is what `--kvbm-compression` and namespaces call it."""

    FP8 = "fp8"
    INT8 = "int8"

    @property
    def largest(self) -> float:
        """What the largest magnitude of a group is mapped to."""
        return 448.0 if self is Compression.FP8 else 127.0


@dataclass(frozen=True)
class HeadLayout:
    """What a page holds: dense elements of `dtype`, dimensions in memory order, `scaled` the ones with own scales.

    A page of K and V, 16 tokens, 8 heads, 128 values, tokens before heads (NHD): `sizes=(2, 16, 8, 128)`,
    `scaled=(0, 2)`; heads before tokens (HND): `sizes=(2, 8, 16, 128)`, `scaled=(0, 1)`. MLA: `(16, 576)`, `()`.
    """

    dtype: torch.dtype
    sizes: tuple[int, ...]
    scaled: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise CopyError(f"KV of {self.dtype} cannot be compressed (bfloat16, float16, float32 can); turn it off")
        if not self.sizes or min(self.sizes) < 1 or not all(0 <= each < len(self.sizes) for each in self.scaled):
            raise CopyError(f"a page of sizes {self.sizes} has no dimensions {self.scaled}")
        levels = self._levels()
        if len(levels) > 4:
            raise CopyError(f"scales over dimensions {self.scaled} of {self.sizes} are too scattered to compress")

    def _levels(self) -> list[int]:
        """Neighbouring dimensions of one kind joined: groups, values, groups, values."""
        levels = [1]
        for number, size in enumerate(self.sizes):
            if size == 1:
                continue
            if (number in self.scaled) == (len(levels) % 2 == 1):
                levels[-1] *= size
            else:
                levels.append(size)
        return levels

    @property
    def levels(self) -> tuple[int, int, int, int]:
        """(groups, values, groups, values), outermost first: every page we know is of this form."""
        levels = self._levels()
        if len(levels) == 2:  # nothing to spread over: (g, v) is (1, 1, g, v), and the tile is one dense range
            levels = [1, 1, *levels]
        levels += [1] * (4 - len(levels))
        return levels[0], levels[1], levels[2], levels[3]

    @property
    def elements(self) -> int:
        return prod(self.sizes)

    @property
    def groups(self) -> int:
        return prod(self.sizes[each] for each in set(self.scaled))

    @property
    def page_bytes(self) -> int:
        return self.elements * int(self.dtype.itemsize)

    @property
    def scales_offset(self) -> int:
        """Where the scales begin in a compressed part."""
        return _aligned(self.elements)

    @property
    def compressed_bytes(self) -> int:
        return self.scales_offset + _aligned(self.groups * _SCALE_BYTES)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN_BYTES) * _ALIGN_BYTES


@dataclass(frozen=True)
class Codec:
    """How the blocks of one model are compressed: one layout a part, in the order of the parts."""

    compression: Compression
    layouts: tuple[HeadLayout, ...]

    @property
    def part_bytes(self) -> tuple[int, ...]:
        """The parts of a compressed row, for `BlockView.of_rows`."""
        return tuple(layout.compressed_bytes for layout in self.layouts)

    @property
    def row_bytes(self) -> int:
        return sum(self.part_bytes)

    def check_views(self, pages: BlockView, rows: BlockView) -> None:
        """Raises `CopyError` unless `pages` are what the layouts say and `rows` are compressed rows of them."""
        wanted = tuple(layout.page_bytes for layout in self.layouts)
        if pages.part_bytes != wanted:
            raise CopyError(f"pages of {pages.part_bytes} bytes are not the stated layouts' {wanted}")
        if rows.part_bytes != self.part_bytes:
            raise CopyError(f"rows of {rows.part_bytes} bytes are not compressed parts of {self.part_bytes}")


def quantise(values: torch.Tensor, layout: HeadLayout, compression: Compression) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, elements) values -> (n, elements) bytes as uint8, and their (n, groups) float32 scales."""
    grouped = values.to(torch.float32).reshape(-1, *layout.levels)
    magnitude = grouped.abs().amax(dim=(2, 4)) + (grouped * 0.0).sum(dim=(2, 4))  # NaN as soon as one is not finite
    scales = (magnitude * torch.tensor(1.0 / compression.largest, dtype=torch.float32)).clamp(min=SMALLEST_SCALE)
    scaled = grouped * (1.0 / scales)[:, :, None, :, None]
    scaled = torch.where(scaled == scaled, scaled, 0.0).clamp(-compression.largest, compression.largest)
    kind = torch.float8_e4m3fn if compression is Compression.FP8 else torch.int8
    coded = (scaled if compression is Compression.FP8 else scaled.round()).to(kind).view(torch.uint8)
    return coded.reshape(len(values), -1), scales.reshape(len(values), -1)


def dequantise(coded: torch.Tensor, scales: torch.Tensor, layout: HeadLayout, compression: Compression) -> torch.Tensor:
    """What `quantise` gave, back as (n, elements) of the layout's dtype."""
    kind = torch.float8_e4m3fn if compression is Compression.FP8 else torch.int8
    grouped = coded.view(kind).to(torch.float32).reshape(-1, *layout.levels)
    outer, _, inner, _ = layout.levels
    values = grouped * scales.reshape(-1, outer, 1, inner, 1)
    return values.reshape(len(coded), -1).to(layout.dtype)


def compress_blocks(
    codec: Codec, pages: BlockView, page_ids: Sequence[int], rows: BlockView, row_ids: Sequence[int]
) -> None:
    """Reference: pages of HBM `page_ids` into compressed rows `row_ids`, every part."""
    codec.check_views(pages, rows)
    from_ids, to_ids = checked_ids(pages.num_blocks, page_ids, rows.num_blocks, row_ids)
    source, target = torch.from_numpy(from_ids).to(pages.device), torch.from_numpy(to_ids).to(rows.device)
    for layout, page, row in zip(codec.layouts, pages.parts, rows.parts, strict=True):
        values = page.index_select(0, source).view(layout.dtype)
        coded, scales = quantise(values, layout, codec.compression)
        whole = torch.zeros((len(values), layout.compressed_bytes), dtype=torch.uint8, device=values.device)
        whole[:, : layout.elements] = coded
        end = layout.scales_offset + layout.groups * _SCALE_BYTES
        whole[:, layout.scales_offset : end] = scales.view(torch.uint8)
        row.index_copy_(0, target, whole.to(row.device))


def expand_blocks(
    codec: Codec, rows: BlockView, row_ids: Sequence[int], pages: BlockView, page_ids: Sequence[int]
) -> None:
    """Reference: compressed rows `row_ids` back into pages `page_ids`, every part."""
    codec.check_views(pages, rows)
    from_ids, to_ids = checked_ids(rows.num_blocks, row_ids, pages.num_blocks, page_ids)
    source, target = torch.from_numpy(from_ids).to(rows.device), torch.from_numpy(to_ids).to(pages.device)
    for layout, row, page in zip(codec.layouts, rows.parts, pages.parts, strict=True):
        whole = row.index_select(0, source).to(page.device)
        end = layout.scales_offset + layout.groups * _SCALE_BYTES
        scales = whole[:, layout.scales_offset : end].contiguous().view(torch.float32)
        values = dequantise(whole[:, : layout.elements].contiguous(), scales, layout, codec.compression)
        page.index_copy_(0, target, values.view(torch.uint8))
