"""`copy_blocks` against a copy of single bytes, over whole allocations: nothing beside the blocks may change."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from dynamo_kernels import BlockView, copy_blocks
from dynamo_kernels.errors import CopyError
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.memory import Arena, arena, naive_copy

SIZES = [1, 3, 7, 8, 4096, 4097]


def assert_exact(src: Arena, src_ids: Sequence[int], dst: Arena, dst_ids: Sequence[int]) -> None:
    expected, source_before = naive_copy(src, src_ids, dst, dst_ids), src.images()
    copy_blocks(src.view, src_ids, dst.view, dst_ids)
    assert dst.images() == expected
    assert src.images() == source_before


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [0, 1, 3, 5])
@pytest.mark.parametrize(("src_offset", "dst_offset"), [(0, 0), (1, 0), (0, 3), (4, 2), (8, 8)])
def test_every_byte_and_no_other(size: int, count: int, src_offset: int, dst_offset: int) -> None:
    src = arena(7, [size], src_offset, gap=0, seed=1)
    dst = arena(6, [size], dst_offset, gap=5, seed=2)
    assert_exact(src, [6, 0, 3, 3, 1][:count], dst, [1, 5, 0, 2, 4][:count])


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    places=st.tuples(*[st.integers(0, 17)] * 4),
    blocks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_any_sizes_offsets_and_strides(
    data: st.DataObject, sizes: list[int], places: tuple[int, ...], blocks: tuple[int, int]
) -> None:
    src = arena(blocks[0], sizes, places[0], places[1], seed=1)
    dst = arena(blocks[1], sizes, places[2], places[3], seed=2)
    dst_ids = data.draw(st.lists(st.integers(0, blocks[1] - 1), unique=True))
    src_ids = data.draw(st.lists(st.integers(0, blocks[0] - 1), min_size=len(dst_ids), max_size=len(dst_ids)))
    assert_exact(src, src_ids, dst, dst_ids)


@pytest.mark.parametrize("sizes", [[24, 24, 24], [1, 8, 3], [4097, 16]])
def test_pages_to_rows_and_back(sizes: list[int]) -> None:
    pages = arena(5, sizes, offset=8, gap=7, seed=1)
    rows = torch.zeros((4, sum(sizes)), dtype=torch.uint8)
    host = BlockView.of_rows(rows, sizes)
    copy_blocks(pages.view, [4, 0, 2], host, [1, 3, 0])
    for block, slot in ((4, 1), (0, 3), (2, 0)):
        joined = torch.cat([part[block] for part in pages.view.parts])
        assert torch.equal(rows[slot], joined), "a row is its pages, layer after layer"
    assert not rows[2].any()
    back = arena(5, sizes, offset=1, gap=3, seed=9)
    expected = naive_copy(pages, [4, 0, 2], back, [0, 1, 4])
    copy_blocks(host, [1, 3, 0], back.view, [0, 1, 4])
    assert back.images() == expected


def test_within_one_view_the_old_bytes_are_copied() -> None:
    blocks = arena(4, [16], 0, 0, seed=1)
    swapped = naive_copy(blocks, [0, 1], blocks, [1, 0])
    copy_blocks(blocks.view, [0, 1], blocks.view, [1, 0])
    assert blocks.images() == swapped


@pytest.mark.parametrize(
    ("src_ids", "dst_ids", "message"),
    [
        ([0, 1], [0], "2 source blocks for 1"),
        ([4], [0], r"source block 4 is outside 0\.\.3"),
        ([-1], [0], "source block -1"),
        ([0], [5], r"destination block 5 is outside 0\.\.4"),
        ([0, 0], [0, -1], "destination block -1"),
        ([0, 1, 2], [3, 1, 3], "named twice"),
    ],
)
def test_a_refused_copy_touches_nothing(src_ids: list[int], dst_ids: list[int], message: str) -> None:
    src, dst = arena(4, [8, 8], 0, 0, seed=1), arena(5, [8, 8], 0, 0, seed=2)
    before = dst.images()
    with pytest.raises(CopyError, match=message):
        copy_blocks(src.view, src_ids, dst.view, dst_ids)
    assert dst.images() == before


@pytest.mark.parametrize("sizes", [[8], [8, 8, 8], [16], [8, 9], [9, 8]])
def test_parts_that_differ_are_refused(sizes: list[int]) -> None:
    src, dst = arena(4, sizes, 0, 0, seed=1), arena(4, [8, 8], 0, 0, seed=2)
    before = dst.images()
    with pytest.raises(CopyError, match="parts differ"):
        copy_blocks(src.view, [0], dst.view, [0])
    assert dst.images() == before


def test_the_smallest_part_bounds_the_ids() -> None:
    view = BlockView((torch.zeros((3, 8), dtype=torch.uint8), torch.zeros((2, 8), dtype=torch.uint8)))
    assert view.num_blocks == 2
    with pytest.raises(CopyError, match="outside"):
        copy_blocks(view, [2], view, [0])
