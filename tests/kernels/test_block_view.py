"""Views of tensors as pages of bytes: the right addresses, whatever the dtype and the order of dimensions."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from dynamo_kernels import BlockView, copy_blocks
from dynamo_kernels.errors import CopyError

DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.float32]
BLOCKS, INNER = 5, (2, 4, 3, 6)
PAGE_ITEMS = 2 * 4 * 3 * 6


def kv_tensor(
    dtype: torch.dtype, order: tuple[int, ...], offset: int, stride: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw memory, and a KV tensor on it whose page dimensions lie in `order`, outermost first."""
    item = dtype.itemsize
    raw = torch.arange((offset + BLOCKS * stride) * item, dtype=torch.int64).to(torch.uint8)
    strides, step = [0] * 4, 1
    for dimension in reversed(order):
        strides[dimension] = step
        step *= INNER[dimension]
    return raw, raw.view(dtype).as_strided((BLOCKS, *INNER), (stride, *strides), offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("offset", "stride"), [(0, PAGE_ITEMS), (3, PAGE_ITEMS), (16, 3 * PAGE_ITEMS + 1)])
def test_a_page_is_its_range_of_bytes(dtype: torch.dtype, offset: int, stride: int) -> None:
    item, page_bytes = dtype.itemsize, PAGE_ITEMS * dtype.itemsize
    for order in permutations(range(4)):
        raw, tensor = kv_tensor(dtype, order, offset, stride)
        view = BlockView.of_pages([tensor], [page_bytes])
        assert (view.num_blocks, view.part_bytes) == (BLOCKS, (page_bytes,))
        for block in range(BLOCKS):
            start = (offset + block * stride) * item
            assert torch.equal(view.parts[0][block], raw[start : start + page_bytes])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_written_through_a_view_are_the_tensors(dtype: torch.dtype) -> None:
    page_bytes = PAGE_ITEMS * dtype.itemsize
    _, tensor = kv_tensor(dtype, (2, 0, 3, 1), 3, 2 * PAGE_ITEMS)
    original = tensor.clone()
    rows = torch.zeros((BLOCKS, page_bytes), dtype=torch.uint8)
    host, pages = BlockView.of_rows(rows, [page_bytes]), BlockView.of_pages([tensor], [page_bytes])
    copy_blocks(pages, range(BLOCKS), host, range(BLOCKS))
    as_bytes = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    tensor.view(as_bytes).zero_()
    copy_blocks(host, [1, 3], pages, [1, 3])
    for block in range(BLOCKS):
        now = tensor[block].contiguous().view(as_bytes)
        assert torch.equal(now, original[block].contiguous().view(as_bytes)) if block in (1, 3) else not now.any()


def test_layers_of_one_allocation_interleaved_by_block() -> None:
    """Cross-layer layout: (blocks, layers, page); each layer's stride is that of all layers."""
    memory = torch.arange(4 * 3 * 10, dtype=torch.uint8).reshape(4, 3, 10)
    view = BlockView.of_pages([memory[:, layer] for layer in range(3)], [10] * 3)
    rows = torch.zeros((1, 30), dtype=torch.uint8)
    copy_blocks(view, [2], BlockView.of_rows(rows, [10] * 3), [0])
    assert torch.equal(rows[0], memory[2].flatten())


@pytest.mark.parametrize("page_bytes", [17, 64, 1 << 20])
def test_pages_beyond_the_storage_are_refused_and_the_storage_stays(page_bytes: int) -> None:
    tensor = torch.zeros((4, 8), dtype=torch.bfloat16)
    address, size = tensor.data_ptr(), tensor.untyped_storage().nbytes()
    with pytest.raises(CopyError, match="beyond"):
        BlockView.of_pages([tensor], [page_bytes])
    assert (tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()) == (address, size)


@pytest.mark.parametrize(
    "part",
    [
        torch.zeros((4, 8), dtype=torch.int8),
        torch.zeros(8, dtype=torch.uint8),
        torch.zeros((4, 2, 8), dtype=torch.uint8),
        torch.zeros((8, 4), dtype=torch.uint8).T,
        torch.zeros((4, 16), dtype=torch.uint8)[:, ::2],
    ],
)
def test_parts_that_are_not_rows_of_bytes_are_refused(part: torch.Tensor) -> None:
    with pytest.raises(CopyError, match="dense rows"):
        BlockView((part,))


def test_a_view_of_nothing_is_refused() -> None:
    with pytest.raises(CopyError, match="at least one part"):
        BlockView(())


def test_rows_that_do_not_hold_the_parts_are_refused() -> None:
    for rows in (torch.zeros((2, 9), dtype=torch.uint8), torch.zeros(10, dtype=torch.uint8)):
        with pytest.raises(CopyError, match="10 bytes in all"):
            BlockView.of_rows(rows, [4, 6])
