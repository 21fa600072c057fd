"""The copy kernels. A fragment is (block, part); both sides are a base, a table of part offsets and block ids.

Everything is counted in 16-byte words from a base that the launcher proves aligned, so every load and store is 16
bytes wide. Rows of a tile beyond the last chunk repeat it: the same bytes twice are cheaper than a mask.
"""
# ruff: noqa: N803 - constexpr arguments are written in capitals, as Triton does

from __future__ import annotations

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

#: Sizes and counts change from call to call: none of them is worth a compilation of its own.
_PLAIN = ("chunks", "parts", "chunks_per_part", "src_stride", "dst_stride")


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _word(ids, offsets, chunk, parts, chunks_per_part, stride, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first int64 of a chunk, counted from the side's base. Ids are loaded ahead by the pipeliner."""
    fragment = chunk // chunks_per_part
    block = fragment // parts
    part = fragment - block * parts
    word = tl.load(ids + block).to(tl.int64) * stride + tl.load(offsets + part)
    return word * 2 + (chunk - fragment * chunks_per_part).to(tl.int64) * WORDS


@triton.jit(do_not_specialize=_PLAIN)  # type: ignore[untyped-decorator, unused-ignore]
def pipelined(  # type: ignore[no-untyped-def]
    src, dst, src_offsets, dst_offsets, src_ids, dst_ids, chunks, parts, chunks_per_part, src_stride, dst_stride,
    ROWS: tl.constexpr, WORDS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Zero-copy: `STAGES - 1` tiles of ROWS x WORDS int64 in flight through shared memory (cp.async), a few CTAs."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WORDS)
    tiles = tl.cdiv(chunks, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        chunk = tl.minimum(tile * ROWS + row, chunks - 1)
        source = _word(src_ids, src_offsets, chunk, parts, chunks_per_part, src_stride, WORDS)
        target = _word(dst_ids, dst_offsets, chunk, parts, chunks_per_part, dst_stride, WORDS)
        words = tl.load(src + source[:, None] + column[None, :], cache_modifier=".cg")
        tl.store(dst + target[:, None] + column[None, :], words)


@triton.jit(do_not_specialize=_PLAIN)  # type: ignore[untyped-decorator, unused-ignore]
def direct(  # type: ignore[no-untyped-def]
    src, dst, src_offsets, dst_offsets, src_ids, dst_ids, chunks, parts, chunks_per_part, src_stride, dst_stride,
    ROWS: tl.constexpr, WORDS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gather and scatter inside HBM: a short burst on every SM, one tile through registers."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WORDS)
    tiles = tl.cdiv(chunks, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        chunk = tl.minimum(tile * ROWS + row, chunks - 1)
        source = _word(src_ids, src_offsets, chunk, parts, chunks_per_part, src_stride, WORDS)
        target = _word(dst_ids, dst_offsets, chunk, parts, chunks_per_part, dst_stride, WORDS)
        tl.store(dst + target[:, None] + column[None, :], tl.load(src + source[:, None] + column[None, :]))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _line(ids, offsets, chunk, parts, chunks_per_part, stride, LINES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first line of 128 bytes of a chunk. The launcher proves that int32 counts them."""
    fragment = chunk // chunks_per_part
    block = fragment // parts
    part = fragment - block * parts
    word = tl.load(ids + block).to(tl.int64) * stride + tl.load(offsets + part)
    return (word // 8).to(tl.int32) + (chunk - fragment * chunks_per_part) * LINES


@triton.jit(do_not_specialize=_PLAIN)  # type: ignore[untyped-decorator, unused-ignore]
def through_tma(  # type: ignore[no-untyped-def]
    src, dst, src_offsets, dst_offsets, src_ids, dst_ids, chunks, parts, chunks_per_part, src_stride, dst_stride,
    LINES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Zero-copy by the tensor memory accelerator: one thread of a CTA moves a tile, no store passes the load units.

    `src` and `dst` are descriptors of a whole side as lines of 128 bytes; what lies outside of it is never written.
    """
    for chunk in tl.range(tl.program_id(0), chunks, tl.num_programs(0), num_stages=STAGES):
        source = _line(src_ids, src_offsets, chunk, parts, chunks_per_part, src_stride, LINES)
        target = _line(dst_ids, dst_offsets, chunk, parts, chunks_per_part, dst_stride, LINES)
        dst.store([target, 0], src.load([source, 0]))
