"""Which tensors are opaque pages, and when two layouts may share bytes."""

from __future__ import annotations

from itertools import permutations

import pytest

from dynamo_connectors.errors import UnsupportedLayoutError
from dynamo_connectors.layout import page_layout

BLOCKS, TOKENS, HEADS, SIZE = 10, 16, 4, 32
PAGE = 2 * TOKENS * HEADS * SIZE


def strides_of(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """Dense strides of `shape` when its dimensions lie in memory in `order`, outermost first."""
    strides, step = [0] * len(shape), 1
    for dimension in reversed(order):
        strides[dimension] = step
        step *= shape[dimension]
    return tuple(strides)


@pytest.mark.parametrize("inner", list(permutations((1, 2, 3, 4))))
def test_any_dense_order_inside_a_block_is_one_page(inner: tuple[int, ...]) -> None:
    shape = (BLOCKS, 2, TOKENS, HEADS, SIZE)
    page = page_layout("l", shape, strides_of(shape, (0, *inner)), item_bytes=2, base_bytes=64)
    assert (page.num_blocks, page.base_bytes) == (BLOCKS, 64)
    assert page.stride_bytes == page.page_bytes == PAGE * 2


def test_pages_of_other_layers_may_lie_between() -> None:
    shape = (BLOCKS, 2, TOKENS, HEADS, SIZE)
    inner = strides_of(shape, (0, 1, 2, 3, 4))[1:]
    page = page_layout("l", shape, (PAGE * 32, *inner), item_bytes=1, base_bytes=3 * PAGE)
    assert (page.stride_bytes, page.page_bytes) == (32 * PAGE, PAGE)


def test_dimensions_of_size_one_may_have_any_stride() -> None:
    page = page_layout("l", (BLOCKS, 1, TOKENS, 1, SIZE), (TOKENS * SIZE, 999, SIZE, 0, 1), item_bytes=2, base_bytes=0)
    assert page.page_bytes == TOKENS * SIZE * 2
    assert page_layout("l", (1, SIZE), (0, 1), item_bytes=2, base_bytes=0).num_blocks == 1


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((BLOCKS, 2, TOKENS, SIZE), (TOKENS * SIZE, BLOCKS * TOKENS * SIZE, SIZE, 1)),  # K and V outermost in memory
        ((BLOCKS, TOKENS, SIZE), (TOKENS * SIZE * 2, SIZE * 2, 1)),  # a slice of every token
        ((BLOCKS, TOKENS, SIZE), (TOKENS * SIZE * 2, SIZE * 2, 2)),
        ((BLOCKS, TOKENS, SIZE), (SIZE, 0, 1)),  # expanded
        ((BLOCKS, TOKENS, SIZE), (SIZE, BLOCKS * SIZE, 1)),  # tokens outermost in memory
    ],
)
def test_scattered_blocks_are_refused(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedLayoutError, match=r"layer l\.3: .*scattered.*VLLM_KV_CACHE_LAYOUT") as caught:
        page_layout("l.3", shape, strides, item_bytes=2, base_bytes=0)
    assert "\n" not in str(caught.value)


def test_overlapping_blocks_are_refused() -> None:
    with pytest.raises(UnsupportedLayoutError, match="overlap"):
        page_layout("l", (BLOCKS, TOKENS, SIZE), (SIZE, SIZE, 1), item_bytes=2, base_bytes=0)


@pytest.mark.parametrize("shape", [(), (BLOCKS,), (0, SIZE), (BLOCKS, 0, SIZE)])
def test_a_tensor_without_blocks_or_bytes_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedLayoutError, match="no block dimension"):
        page_layout("l", shape, (1,) * len(shape), item_bytes=2, base_bytes=0)


def test_keys_and_values_outermost_look_like_two_huge_blocks() -> None:
    """Only the engine knows its number of blocks, so the adapter has to compare: here 2 is not BLOCKS."""
    shape = (2, BLOCKS, TOKENS, HEADS, SIZE)
    page = page_layout("l", shape, strides_of(shape, (0, 1, 2, 3, 4)), item_bytes=1, base_bytes=0)
    assert page.num_blocks == 2 != BLOCKS
    assert page.page_bytes == BLOCKS * PAGE // 2


def test_the_order_inside_a_page_is_told() -> None:
    """NHD and HND pages have equal sizes, and one read as the other is noise."""
    shape = (BLOCKS, 2, TOKENS, HEADS, SIZE)
    orders = [strides_of(shape, (0, *inner)) for inner in permutations((1, 2, 3, 4))]
    assert len({page_layout("l", shape, strides, 2, 0).order for strides in orders}) == len(orders)


def test_the_stride_of_a_dimension_of_size_one_is_not_told() -> None:
    strides = ((SIZE, any_stride, 1) for any_stride in (1, SIZE, 999))
    assert len({page_layout("l", (BLOCKS, 1, SIZE), each, 2, 0).order for each in strides}) == 1
