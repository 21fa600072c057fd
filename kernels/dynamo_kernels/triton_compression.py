"""Quantise-and-copy and its inverse. One tile is all values of a few groups: (values, groups, values).

The arithmetic is the reference's, operation by operation (`compression.quantise`), so that both give the same bytes.
"""
# ruff: noqa: N803, N806 - constexprs are written in capitals, as Triton does

from __future__ import annotations

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

_PLAIN = ("blocks", "parts", "page_stride", "row_stride")
#: Adding and taking it away rounds a float32 below 2**22 to a whole number, half to even.
_ROUND = tl.constexpr(12582912.0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _place(  # type: ignore[no-untyped-def]
    work, parts, page_offsets, row_offsets, page_ids, row_ids, page_stride, row_stride,
    OUTER: tl.constexpr, INNER: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """(page element, row byte, outer group, first inner group) of a piece of work."""
    PIECES: tl.constexpr = OUTER * (INNER // GROUPS)
    fragment = work // PIECES
    piece = work - fragment * PIECES
    block = fragment // parts
    part = fragment - block * parts
    page = tl.load(page_ids + block).to(tl.int64) * page_stride + tl.load(page_offsets + part)
    row = tl.load(row_ids + block).to(tl.int64) * row_stride + tl.load(row_offsets + part)
    outer = piece // (INNER // GROUPS)
    return page, row, outer, (piece - outer * (INNER // GROUPS)) * GROUPS


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _tile(  # type: ignore[no-untyped-def]
    outer, first, MIDDLE: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    MIDDLE_2: tl.constexpr, WIDTH_2: tl.constexpr,
):  # fmt: skip
    """(element numbers, mask) of the groups `first ...` under `outer`; the _2 sizes are the next powers of two."""
    middle = tl.arange(0, MIDDLE_2)[:, None, None]
    group = first + tl.arange(0, GROUPS)[None, :, None]
    column = tl.arange(0, WIDTH_2)[None, None, :]
    elements = ((outer * MIDDLE + middle) * INNER + group) * WIDTH + column
    return elements, (middle < MIDDLE) & (column < WIDTH) & (group < INNER)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rounded_to_e4m3(values):  # type: ignore[no-untyped-def]
    """To the nearest value of the format, half to even: the cast after it is then exact, also in the interpreter."""
    bits = values.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (values + 24576.0) - 24576.0  # steps of 2**-9; the sign of a zero comes from the value
    small = tl.where(small == 0.0, values * 0.0, small)
    return tl.where(tl.abs(values) < 0.015625, small, normal)


@triton.jit(do_not_specialize=_PLAIN)  # type: ignore[untyped-decorator, unused-ignore]
def quantise_pages(  # type: ignore[no-untyped-def]
    pages, rows, page_offsets, row_offsets, page_ids, row_ids, blocks, parts, page_stride, row_stride,
    SCALES_AT: tl.constexpr, OUTER: tl.constexpr, MIDDLE: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, MIDDLE_2: tl.constexpr, WIDTH_2: tl.constexpr, FP8: tl.constexpr, SMALLEST: tl.constexpr,
    PAGE_AT: tl.constexpr, ROW_AT: tl.constexpr,
):  # fmt: skip
    """HBM pages to compressed rows, which may lie in pinned memory."""
    count = blocks * parts * OUTER * (INNER // GROUPS)
    for work in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=1):
        page, row, outer, first = _place(
            work, parts, page_offsets, row_offsets, page_ids, row_ids, page_stride, row_stride, OUTER, INNER, GROUPS
        )
        page, row = tl.multiple_of(page, PAGE_AT), tl.multiple_of(row, ROW_AT)
        elements, inside = _tile(outer, first, MIDDLE, INNER, WIDTH, GROUPS, MIDDLE_2, WIDTH_2)
        values = tl.load(pages + page + elements, mask=inside, other=0.0).to(tl.float32)
        magnitude = tl.max(tl.max(tl.abs(values), axis=2), axis=0)
        magnitude += tl.sum(tl.sum(values * 0.0, axis=2), axis=0)
        LARGEST: tl.constexpr = 448.0 if FP8 else 127.0
        scale = tl.maximum(magnitude * (1.0 / LARGEST), SMALLEST, propagate_nan=tl.PropagateNan.ALL)
        scaled = values * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[None, :, None]
        scaled = tl.minimum(tl.maximum(tl.where(scaled == scaled, scaled, 0.0), -LARGEST), LARGEST)
        if FP8:
            coded = _rounded_to_e4m3(scaled).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            coded = ((scaled + _ROUND) - _ROUND).to(tl.int8).to(tl.uint8, bitcast=True)
        tl.store(rows + row + elements, coded, mask=inside)
        scales = (rows + row + SCALES_AT).to(tl.pointer_type(tl.float32))
        tl.store(scales + outer * INNER + first + tl.arange(0, GROUPS), scale)


@triton.jit(do_not_specialize=_PLAIN)  # type: ignore[untyped-decorator, unused-ignore]
def dequantise_pages(  # type: ignore[no-untyped-def]
    pages, rows, page_offsets, row_offsets, page_ids, row_ids, blocks, parts, page_stride, row_stride,
    SCALES_AT: tl.constexpr, OUTER: tl.constexpr, MIDDLE: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, MIDDLE_2: tl.constexpr, WIDTH_2: tl.constexpr, FP8: tl.constexpr, SMALLEST: tl.constexpr,
    PAGE_AT: tl.constexpr, ROW_AT: tl.constexpr,
):  # fmt: skip
    """Compressed rows back to HBM pages."""
    count = blocks * parts * OUTER * (INNER // GROUPS)
    for work in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=1):
        page, row, outer, first = _place(
            work, parts, page_offsets, row_offsets, page_ids, row_ids, page_stride, row_stride, OUTER, INNER, GROUPS
        )
        page, row = tl.multiple_of(page, PAGE_AT), tl.multiple_of(row, ROW_AT)
        elements, inside = _tile(outer, first, MIDDLE, INNER, WIDTH, GROUPS, MIDDLE_2, WIDTH_2)
        coded = tl.load(rows + row + elements, mask=inside, other=0)
        scales = (rows + row + SCALES_AT).to(tl.pointer_type(tl.float32))
        scale = tl.load(scales + outer * INNER + first + tl.arange(0, GROUPS))
        if FP8:
            values = coded.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            values = coded.to(tl.int8, bitcast=True).to(tl.float32)
        values = values * scale[None, :, None]
        tl.store(pages + page + elements, values.to(pages.dtype.element_ty), mask=inside)
