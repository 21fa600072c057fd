"""Where the bytes of a pair of views lie, as plain numbers: what the copy engines and the kernels need to know.

Parts that are neighbours on both sides are one part (a cross-layer page is then one fragment a block), and parts of
one size and one stride form a band, which is one launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dynamo_kernels.block_view import BlockView
from dynamo_kernels.errors import CopyError

Addresses = NDArray[np.int64]

#: The widest load and store of a thread, and so what every address of a kernel must be a multiple of.
WORD_BYTES = 16
#: Bytes a kernel moves at a time: 5 of them in flight from 2 CTAs fill PCIe 5 (H200, 2026-11-22).
TILE_BYTES = 16 << 10
#: Fragments whose power-of-two share is smaller waste the kernels' loads; the copy engines take them.
_SMALLEST_CHUNK_BYTES = 128
#: What TMA counts in: a row of its widest swizzle. It moves whole tiles of them, and its coordinates are int32.
LINE_BYTES = 128
_MOST_LINES = 2**31 - 1
#: The driver takes a larger pitch (3.4 GiB: rc 0) and writes elsewhere (H200, driver 13.0, 2026-11-22).
MAX_PITCH_BYTES = 2**31 - 1


@dataclass(frozen=True)
class Side:
    """One side of a band: the address of part i of block b is `bases[i] + b * stride`."""

    bases: tuple[int, ...]
    stride: int
    #: 0 where nobody needs to know (staging).
    blocks: int = 0

    @property
    def first(self) -> int:
        return min(self.bases)

    @property
    def offsets(self) -> Addresses:
        return np.asarray(self.bases, np.int64) - self.first

    @property
    def spacing(self) -> int | None:
        """The constant distance from part to part, or None."""
        steps = {later - earlier for earlier, later in zip(self.bases, self.bases[1:], strict=False)}
        return steps.pop() if len(steps) == 1 else None

    def addresses(self, ids: Addresses) -> Addresses:
        """(blocks, parts) addresses."""
        return np.asarray(self.bases, np.int64) + ids[:, None] * self.stride


@dataclass(frozen=True)
class Band:
    """Parts of `part_bytes` each, equally far from block to block on each side."""

    part_bytes: int
    src: Side
    dst: Side

    @property
    def parts(self) -> int:
        return len(self.src.bases)

    @property
    def block_bytes(self) -> int:
        return self.part_bytes * self.parts

    @property
    def chunk_bytes(self) -> int:
        """What a kernel takes of a fragment at a time: a power of two that divides it."""
        return min(self.part_bytes & -self.part_bytes, TILE_BYTES)

    @property
    def for_kernels(self) -> bool:
        """Whether 16-byte loads and stores reach everything, in chunks that are worth them."""
        places = (*self.src.bases, *self.dst.bases, self.src.stride, self.dst.stride, self.part_bytes)
        return all(place % WORD_BYTES == 0 for place in places) and self.chunk_bytes >= _SMALLEST_CHUNK_BYTES

    @property
    def for_tma(self) -> bool:
        """Whether TMA reaches everything: whole tiles, at whole lines from the first part of a side."""
        sides = (self.src, self.dst)
        distances = (self.part_bytes % TILE_BYTES, *(side.stride % LINE_BYTES for side in sides))
        apart = any((side.offsets % LINE_BYTES).any() for side in sides)
        return self.for_kernels and not any(distances) and not apart and all(map(self._has_lines_for_tma, sides))

    def _has_lines_for_tma(self, side: Side) -> bool:
        return side.blocks > 0 and self.lines(side) <= _MOST_LINES

    def lines(self, side: Side) -> int:
        """Lines from a side's first byte to its last."""
        return (max(side.bases) - side.first + (side.blocks - 1) * side.stride + self.part_bytes) // LINE_BYTES

    @property
    def pitches(self) -> tuple[int, int] | None:
        """The spacing of both sides when one block is one two-dimensional copy, else None."""
        src, dst = self.src.spacing, self.dst.spacing
        if src is None or dst is None:
            return None
        if not all(self.part_bytes <= pitch <= MAX_PITCH_BYTES for pitch in (src, dst)):
            return None
        return src, dst


def bands(src: BlockView, dst: BlockView) -> tuple[Band, ...]:
    """The bands that copying blocks from `src` to `dst` consists of."""
    if src.part_bytes != dst.part_bytes:
        raise CopyError(f"parts differ: source {src.part_bytes} bytes, destination {dst.part_bytes}")
    joined: list[list[int]] = []  # src base, src stride, dst base, dst stride, bytes
    for source, target in zip(src.parts, dst.parts, strict=True):
        part = [source.data_ptr(), source.stride(0), target.data_ptr(), target.stride(0), source.shape[1]]
        last = joined[-1] if joined else None
        if last and last[1::2] == part[1::2] and all(last[side] + last[4] == part[side] for side in (0, 2)):
            last[4] += part[4]
        else:
            joined.append(part)
    alike: dict[tuple[int, int, int], list[list[int]]] = {}
    for part in joined:
        alike.setdefault((part[4], part[1], part[3]), []).append(part)
    return tuple(
        Band(
            size,
            Side(tuple(part[0] for part in parts), src_stride, src.num_blocks),
            Side(tuple(part[2] for part in parts), dst_stride, dst.num_blocks),
        )
        for (size, src_stride, dst_stride), parts in alike.items()
    )
