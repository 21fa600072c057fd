"""Copies by the GPU's copy engines: the tables that the driver's batch calls want, built without a loop over blocks.

Flat: one entry a fragment. Lines: one entry a block, its parts being the lines of a two-dimensional copy; the engine
then needs 0.4 us for 16 KiB instead of the host's 1.2 us (H200, 2026-11-22).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamo_kernels.geometry import Addresses, Band

#: CU_MEMCPY_SRC_ACCESS_ORDER_STREAM. Never ANY: it may read blocks that compute has not written (vLLM #45704).
ORDER_STREAM = 1
#: CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE.
OVERLAP = 1
_POINTER = 1

#: CUmemcpy3DOperand's pointer form and CUDA_MEMCPY3D_BATCH_OP, as the driver lays them out.
_OPERAND = [("type", "u4"), ("_", "u4"), ("ptr", "u8"), ("row", "u8"), ("height", "u8"), ("hint", "u8")]
LINE_COPY = np.dtype(
    [
        ("src", _OPERAND),
        ("dst", _OPERAND),
        ("width", "u8"),
        ("lines", "u8"),
        ("depth", "u8"),
        ("order", "u4"),
        ("flags", "u4"),
    ]
)


@dataclass(frozen=True)
class Fragments:
    """Flat copies, `sizes[i]` bytes from `srcs[i]` to `dsts[i]`."""

    srcs: NDArray[np.uint64]
    dsts: NDArray[np.uint64]
    sizes: NDArray[np.uint64]


def fragments(band: Band, src_ids: Addresses, dst_ids: Addresses) -> Fragments:
    """Every fragment of these blocks; neighbours on both sides are one."""
    srcs, dsts = band.src.addresses(src_ids).ravel(), band.dst.addresses(dst_ids).ravel()
    sizes = np.full(len(srcs), band.part_bytes, np.int64)
    starts = np.ones(len(srcs), bool)
    starts[1:] = (np.diff(srcs) != band.part_bytes) | (np.diff(dsts) != band.part_bytes)
    if not starts.all():
        sizes = np.add.reduceat(sizes, np.flatnonzero(starts))
        srcs, dsts = srcs[starts], dsts[starts]
    return Fragments(srcs.astype(np.uint64), dsts.astype(np.uint64), sizes.astype(np.uint64))


def line_copies(band: Band, src_ids: Addresses, dst_ids: Addresses) -> NDArray[Any]:
    """One `LINE_COPY` a block. The band must have pitches."""
    pitches = band.pitches
    assert pitches is not None, "only a band with pitches is made of lines"
    copies = np.zeros(len(src_ids), LINE_COPY)
    sides = (("src", band.src, src_ids, pitches[0]), ("dst", band.dst, dst_ids, pitches[1]))
    for name, side, ids, pitch in sides:
        operand = copies[name]
        operand["type"], operand["row"], operand["height"] = _POINTER, pitch, band.parts
        operand["ptr"] = (side.first + ids * side.stride).astype(np.uint64)
    copies["width"], copies["lines"], copies["depth"] = band.part_bytes, band.parts, 1
    copies["order"], copies["flags"] = ORDER_STREAM, OVERLAP
    return copies
