"""What a pair of views comes down to, and the tables that the driver is given."""

from __future__ import annotations

import numpy as np
import torch
from dynamo_kernels import BlockView
from dynamo_kernels.dma import LINE_COPY, ORDER_STREAM, fragments, line_copies
from dynamo_kernels.driver import _Attributes
from dynamo_kernels.geometry import MAX_PITCH_BYTES, Band, Side, bands


def rows_of(sizes: list[int], slots: int = 4) -> BlockView:
    return BlockView.of_rows(torch.zeros((slots, sum(sizes)), dtype=torch.uint8), sizes)


def test_neighbours_on_both_sides_are_one_part() -> None:
    (band,) = bands(rows_of([32, 16, 16]), rows_of([32, 16, 16]))
    assert (band.part_bytes, band.parts, band.src.stride) == (64, 1, 64)


def test_neighbours_on_one_side_only_stay_apart() -> None:
    pages = BlockView.of_pages([torch.zeros((4, 16), dtype=torch.uint8) for _ in range(3)], [16] * 3)
    (band,) = bands(pages, rows_of([16] * 3))
    assert (band.part_bytes, band.parts, band.dst.spacing) == (16, 3, 16)


def test_parts_of_different_sizes_are_different_bands() -> None:
    pages = BlockView.of_pages([torch.zeros((4, size), dtype=torch.uint8) for size in (16, 48, 16)], [16, 48, 16])
    found = bands(pages, rows_of([16, 48, 16]))
    assert sorted((band.part_bytes, band.parts) for band in found) == [(16, 2), (48, 1)]


def band(size: int, src: tuple[int, ...], dst: tuple[int, ...], strides: tuple[int, int] = (1 << 20, 1 << 20)) -> Band:
    return Band(size, Side(src, strides[0]), Side(dst, strides[1]))


def test_lines_need_one_distance_on_each_side_and_a_pitch_that_the_driver_obeys() -> None:
    assert band(16, (0, 64, 128), (0, 16, 32)).pitches == (64, 16)
    assert band(16, (0, 64, 130), (0, 16, 32)).pitches is None
    assert band(16, (64, 0), (0, 16)).pitches is None, "backwards"
    assert band(16, (0, 8), (0, 16)).pitches is None, "overlapping"
    assert band(16, (0,), (0,)).pitches is None, "one part"
    assert band(16, (0, MAX_PITCH_BYTES), (0, 16)).pitches == (MAX_PITCH_BYTES, 16)
    assert band(16, (0, MAX_PITCH_BYTES + 1), (0, 16)).pitches is None


def test_kernels_need_sixteen_byte_addresses_and_worthwhile_chunks() -> None:
    assert band(4096, (0,), (16,)).for_kernels
    assert not band(4096, (8,), (16,)).for_kernels
    assert not band(4096, (0,), (16,), (1000, 1 << 20)).for_kernels
    assert not band(4097, (0,), (16,)).for_kernels
    assert not band(4096 + 16, (0,), (16,)).for_kernels, "chunks of 16 bytes"
    assert band(18432, (0,), (16,)).chunk_bytes == 2048
    assert band(4 << 20, (0,), (16,)).chunk_bytes == 16 << 10


def test_tma_needs_whole_tiles_at_whole_lines_and_knows_where_a_side_ends() -> None:
    tile = 16 << 10

    def sides(
        size: int,
        src: tuple[int, ...],
        dst: tuple[int, ...],
        strides: tuple[int, int] = (1 << 20, 1 << 20),
        blocks: int = 9,
    ) -> Band:
        return Band(size, Side(src, strides[0], blocks), Side(dst, strides[1], blocks))

    assert sides(tile, (16, 16 + 256), (48, 48 + 128)).for_tma, "lines count from the first part"
    assert sides(3 * tile, (0,), (16,)).for_tma
    assert not sides(tile + 128, (0,), (16,)).for_tma, "no whole tiles"
    assert not sides(tile, (8,), (16,)).for_tma, "TMA wants 16-byte addresses too"
    assert not sides(tile, (0, 16), (16, 16 + 128)).for_tma, "a part between lines"
    assert not sides(tile, (0,), (16,), (1 << 20, tile + 64)).for_tma
    assert not sides(tile, (0,), (16,), blocks=0).for_tma, "nobody said where it ends"
    found = sides(tile, (64, 64 + 1024), (0, tile))
    assert found.lines(found.src) * 128 == 1024 + 8 * (1 << 20) + tile
    most = 2**31 - 1
    assert sides(tile, (0,), (0,), (128, 128), blocks=most - 127).for_tma
    assert not sides(tile, (0,), (0,), (128, 128), blocks=most - 126).for_tma, "int32 counts the lines"


def test_views_say_how_many_blocks_a_side_has() -> None:
    (found,) = bands(rows_of([16 << 10], slots=5), rows_of([16 << 10], slots=3))
    assert (found.src.blocks, found.dst.blocks, found.lines(found.dst)) == (5, 3, 3 * 128)


def test_fragments_that_touch_on_both_sides_are_one_copy() -> None:
    table = fragments(band(16, (1000,), (5000,), (16, 16)), np.array([0, 1, 2, 5, 6]), np.array([3, 4, 5, 6, 8]))
    assert table.srcs.tolist() == [1000, 1080, 1096]
    assert table.dsts.tolist() == [5048, 5096, 5128]
    assert table.sizes.tolist() == [48, 16, 16]


def test_the_line_table_is_the_drivers_struct() -> None:
    """Offsets of CUDA_MEMCPY3D_BATCH_OP (cuda.h of CUDA 12.8 and 13.0), and of CUmemcpyAttributes."""
    offsets = {name: LINE_COPY.fields[name][1] for name in LINE_COPY.names}  # type: ignore[index,union-attr]
    assert offsets == {"src": 0, "dst": 40, "width": 80, "lines": 88, "depth": 96, "order": 104, "flags": 108}
    operand = LINE_COPY["src"]
    assert {name: operand.fields[name][1] for name in operand.names} == {  # type: ignore[index,union-attr]
        "type": 0, "_": 4, "ptr": 8, "row": 16, "height": 24, "hint": 32
    }  # fmt: skip
    assert LINE_COPY.itemsize == 112
    assert [getattr(_Attributes, name).offset for name in ("order", "src_hint", "dst_hint", "flags")] == [0, 4, 12, 20]


def test_sources_are_read_in_stream_order() -> None:
    """Never ANY (3): it may read blocks that compute has not written."""
    table = line_copies(band(16, (0, 64), (0, 16)), np.array([1]), np.array([2]))
    assert (ORDER_STREAM, table["order"].tolist()) == (1, [1])
