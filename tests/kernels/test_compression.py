"""What compressed KV costs: the stated error bound, the shapes that are refused, rows of the stated size."""

from __future__ import annotations

import pytest
import torch
from dynamo_kernels import BlockView
from dynamo_kernels.compressed_copy import CompressedCopy
from dynamo_kernels.compression import (
    Codec,
    Compression,
    HeadLayout,
    compress_blocks,
    dequantise,
    expand_blocks,
    quantise,
)
from dynamo_kernels.errors import CopyError
from hypothesis import given, settings
from hypothesis import strategies as st

NHD = HeadLayout(torch.bfloat16, (2, 16, 8, 128), (0, 2))
HND = HeadLayout(torch.bfloat16, (2, 8, 16, 128), (0, 1))
MLA = HeadLayout(torch.bfloat16, (16, 576), ())
SLACK = 1 + 2.0**-20


def bound(values: torch.Tensor, largest: torch.Tensor, compression: Compression) -> torch.Tensor:
    """The docstring of `dynamo_kernels.compression`, as arithmetic."""
    if compression is Compression.INT8:
        return (largest / 254 * SLACK).expand_as(values)
    return torch.maximum(values.abs() / 16, largest / 448 / 1024) * SLACK


@settings(max_examples=60, deadline=None)
@given(
    compression=st.sampled_from(list(Compression)),
    shape=st.sampled_from([((2, 4, 2, 8), (0, 2)), ((2, 2, 4, 8), (0, 1)), ((4, 9), ()), ((3, 5), (0, 1))]),
    exponent=st.integers(-30, 30),
    spread=st.floats(0, 12),
    seed=st.integers(0, 2**31),
)
def test_every_value_is_within_the_stated_error(
    compression: Compression, shape: tuple[tuple[int, ...], tuple[int, ...]], exponent: int, spread: float, seed: int
) -> None:
    layout = HeadLayout(torch.float32, *shape)
    random = torch.Generator().manual_seed(seed)
    size = (3, layout.elements)
    values = (
        torch.randn(size, generator=random) * 2.0**exponent * torch.exp(-spread * torch.rand(size, generator=random))
    )
    back = dequantise(*quantise(values, layout, compression), layout, compression)
    there, here = (each.double().reshape(-1, *layout.levels) for each in (values, back))
    largest = there.abs().amax(dim=(2, 4), keepdim=True)
    assert ((there - here).abs() <= bound(there, largest, compression)).all()


@settings(max_examples=80, deadline=None)
@given(
    compression=st.sampled_from(list(Compression)),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    exponent=st.integers(-12, 12),
    spread=st.floats(0, 12),
    seed=st.integers(0, 2**31),
)
def test_errors_do_not_pile_up_when_blocks_go_down_again_and_again(
    compression: Compression, dtype: torch.dtype, exponent: int, spread: float, seed: int
) -> None:
    """What has come back may be compressed once more, from HBM. That moves it once, then by rounding alone."""
    layout = HeadLayout(dtype, (4, 2, 64), (1,))
    random = torch.Generator().manual_seed(seed)
    size = (2, layout.elements)
    values = (
        torch.randn(size, generator=random) * 2.0**exponent * torch.exp(-spread * torch.rand(size, generator=random))
    )
    passes = [values.to(dtype)]
    for _ in range(4):
        passes.append(dequantise(*quantise(passes[-1], layout, compression), layout, compression))
    first, second, fourth = (passes[number].double().reshape(-1, *layout.levels) for number in (0, 2, 4))
    largest = first.abs().amax(dim=(2, 4), keepdim=True)
    rounding = torch.finfo(dtype).eps * second.abs() + largest * 2.0**-20
    assert ((fourth - second).abs() <= rounding).all()
    assert ((fourth - first).abs() <= 2 * bound(first, largest, compression) + 3 * rounding).all()


@pytest.mark.parametrize("compression", Compression)
def test_the_bound_is_nearly_reached(compression: Compression) -> None:
    """A bound that nothing comes near to says nothing."""
    layout = HeadLayout(torch.float32, (4096,), ())
    values = torch.linspace(-1, 1, 4096)[None]
    back = dequantise(*quantise(values, layout, compression), layout, compression)
    share = (values - back).abs() / bound(values, torch.ones(1, 1), compression)
    assert 0.9 < float(share.max()) <= 1.0


@pytest.mark.parametrize("compression", Compression)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_group_with_one_value_that_is_not_finite_is_nan_and_no_other(compression: Compression, value: float) -> None:
    layout = HeadLayout(torch.float32, (2, 4), (0,))
    values = torch.ones(1, 8)
    values[0, 1] = value
    back = dequantise(*quantise(values, layout, compression), layout, compression)
    assert back[0, :4].isnan().all()
    assert torch.equal(back[0, 4:], values[0, 4:])


@pytest.mark.parametrize("compression", Compression)
def test_zeros_stay_zeros(compression: Compression) -> None:
    coded, scales = quantise(torch.zeros(1, 8), HeadLayout(torch.float32, (8,), ()), compression)
    assert not coded.any()
    assert scales.isfinite().all()


@pytest.mark.parametrize(
    ("layout", "levels", "groups", "compressed"),
    [(NHD, (2, 16, 8, 128), 16, 32832), (HND, (1, 1, 16, 2048), 16, 32832), (MLA, (1, 1, 1, 9216), 1, 9232)],
)
def test_shapes_that_engines_have(layout: HeadLayout, levels: tuple[int, ...], groups: int, compressed: int) -> None:
    assert (layout.levels, layout.groups, layout.compressed_bytes) == (levels, groups, compressed)


def test_every_scale_belongs_to_its_head_alone() -> None:
    """K and V, and head from head: making one larger changes no other."""
    for layout in (NHD, HND):
        values = torch.ones(1, *layout.sizes)
        index = tuple(0 if dimension in layout.scaled else slice(None) for dimension in range(4))
        values[(0, *index)] = 1000.0
        _, scales = quantise(values.reshape(1, -1), layout, Compression.INT8)
        assert sorted(set((scales * 127).round().flatten().tolist())) == [1.0, 1000.0]
        assert int((scales * 127 > 2).sum()) == 1


@pytest.mark.parametrize(
    ("dtype", "sizes", "scaled"),
    [
        (torch.float8_e4m3fn, (2, 16, 8, 128), (0, 2)),
        (torch.uint8, (64,), ()),
        (torch.bfloat16, (), ()),
        (torch.bfloat16, (2, 0), ()),
        (torch.bfloat16, (2, 4), (2,)),
        (torch.bfloat16, (2, 3, 2, 3, 2, 3), (0, 2, 4)),
    ],
)
def test_what_cannot_be_stated_is_refused(dtype: torch.dtype, sizes: tuple[int, ...], scaled: tuple[int, ...]) -> None:
    with pytest.raises(CopyError):
        HeadLayout(dtype, sizes, scaled)


def test_groups_beyond_a_tile_are_refused_where_kernels_would_run() -> None:
    codec = Codec(Compression.FP8, (HeadLayout(torch.bfloat16, (128, 1024), ()),))
    with pytest.raises(CopyError, match="too large"):
        CompressedCopy(codec, *views(codec, 1)[:2])


def views(codec: Codec, blocks: int) -> tuple[BlockView, BlockView, list[torch.Tensor]]:
    values = [torch.randn(blocks, layout.elements).to(layout.dtype) for layout in codec.layouts]
    pages = BlockView.of_pages(values, [layout.page_bytes for layout in codec.layouts])
    rows = torch.zeros((blocks, codec.row_bytes), dtype=torch.uint8)
    return pages, BlockView.of_rows(rows, codec.part_bytes), values


@pytest.mark.parametrize("compression", Compression)
def test_blocks_come_back_where_they_belong_and_nothing_else_changes(compression: Compression) -> None:
    codec = Codec(compression, (NHD, MLA, NHD))
    pages, rows, values = views(codec, 4)
    CompressedCopy(codec, pages, rows).store([3, 1], [0, 2])
    assert not any(part[1].any() or part[3].any() for part in rows.parts)
    before = [value.clone() for value in values]
    for value in values:
        value.zero_()
    CompressedCopy(codec, pages, rows).load([2, 0], [0, 3])
    for value, was in zip(values, before, strict=True):
        assert not value[1:3].any()
        for block, original in ((0, 1), (3, 3)):
            assert (value[block].float() - was[original].float()).abs().max() < was[original].float().abs().max() / 15


def test_views_of_other_sizes_are_refused() -> None:
    codec, other = Codec(Compression.FP8, (NHD,)), Codec(Compression.FP8, (MLA,))
    pages, rows, _ = views(codec, 2)
    wrong_pages, wrong_rows, _ = views(other, 2)
    for bad_pages, bad_rows in ((wrong_pages, rows), (pages, wrong_rows)):
        with pytest.raises(CopyError):
            compress_blocks(codec, bad_pages, [0], bad_rows, [0])
        with pytest.raises(CopyError):
            expand_blocks(codec, bad_rows, [0], bad_pages, [0])


def test_rows_are_half_the_bytes() -> None:
    assert NHD.compressed_bytes / NHD.page_bytes < 0.502
