"""Compressing KV caches that vLLM's own code lays out: every head with its own scales, and no guess anywhere."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from dynamo_kernels.block_view import BlockView
from dynamo_kernels.compression import compress_blocks, expand_blocks
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from dynamo_connectors.errors import ConfigError
from dynamo_connectors.head_map import Heads
from dynamo_connectors.vllm import kv_heads
from dynamo_connectors.vllm.kv_heads import check_compressible, planned_compressed_bytes, read_codec, read_heads
from dynamo_connectors.vllm.kv_pages import planned_row_bytes, read_pages

HEADS, TOKENS, WIDTH = 3, 16, 8
SPEC = FullAttentionSpec(block_size=TOKENS, num_kv_heads=HEADS, head_size=WIDTH, dtype=torch.bfloat16)
LAYERS = ["layer.0", "layer.1", "layer.2"]
NUM_BLOCKS = 5
COMPACT = [layout for layout in KVCacheLayout if layout.is_block_compact]


def caches(layout: KVCacheLayout, kernel_tokens: int | None = None) -> tuple[Any, dict[str, torch.Tensor]]:
    """A cache of vLLM's making, in which every head has a magnitude of its own."""
    cache_config = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: layout,
        num_gpu_blocks_override=NUM_BLOCKS,
        prefix_cache_retention_interval=None,
    )
    config = SimpleNamespace(cache_config=cache_config, attention_config=SimpleNamespace(hisparse_config=None))
    planned = get_kv_cache_config_from_groups(config, [KVCacheGroupSpec(LAYERS, SPEC)], 1 << 30)  # type: ignore[arg-type]
    # vLLM plans a tensor a layer, or one for all.
    raw = torch.zeros(max(tensor.offset + tensor.size for tensor in planned.kv_cache_tensors), dtype=torch.int8)
    views: dict[str, torch.Tensor] = {}
    random = torch.Generator().manual_seed(3)
    for number, tensor in enumerate(planned.kv_cache_tensors):
        own = raw if len(planned.kv_cache_tensors) == 1 else torch.zeros(tensor.offset + tensor.size, dtype=torch.int8)
        made = create_kv_cache_views(own, SPEC, NUM_BLOCKS, layout, tensor, kernel_tokens)
        for layer, view in zip(tensor.layers, made, strict=True):
            scales = 10.0 ** torch.arange(HEADS).reshape(1, HEADS, 1, 1) * (1 + number)
            view.copy_(torch.randn(view.shape, generator=random) * scales)
            views[layer] = view
    return planned, views


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("layout", COMPACT, ids=lambda layout: layout.name)
def test_every_head_keeps_the_stated_precision_of_its_own_magnitude(layout: KVCacheLayout, kind: str) -> None:
    planned, views = caches(layout)
    pages = read_pages(views, planned, kind)
    assert pages.codec is not None
    assert pages.row_bytes == planned_row_bytes(planned, kind) < 0.6 * planned_row_bytes(planned)
    rows = BlockView.of_rows(torch.zeros((2, pages.row_bytes), dtype=torch.uint8), pages.codec.part_bytes)
    before = {layer: view.clone() for layer, view in views.items()}
    compress_blocks(pages.codec, pages.view, [4], rows, [1])
    expand_blocks(pages.codec, rows, [1], pages.view, [2])
    for layer, view in views.items():
        error = (view[2].double() - before[layer][4].double()).abs().amax(dim=(1, 2))
        largest = before[layer][4].double().abs().amax(dim=(1, 2))
        # The format's own error, and the rounding to bfloat16 behind it.
        assert (error <= largest * ((1 / 16 if kind == "fp8" else 1 / 254) + 2**-8)).all(), layer
        for other in (0, 1, 3, 4):
            assert torch.equal(view[other], before[layer][other]), f"{layer} block {other} changed"


def test_keys_and_values_share_no_scale_wherever_a_kernel_keeps_them() -> None:
    """Side by side in each token for GPUs, half of the block each for CPUs."""
    page = torch.empty((2, HEADS, TOKENS, 2 * WIDTH), dtype=torch.bfloat16)
    assert read_heads("l", SPEC, page).sizes == (HEADS, 2, TOKENS * WIDTH)
    on_gpu = read_heads("l", SPEC, page.to("meta"))
    assert (on_gpu.sizes, on_gpu.scaled) == ((HEADS, TOKENS, 2, WIDTH), (0, 2))
    tokens_first = page.to("meta").transpose(1, 2).contiguous().transpose(1, 2)
    assert read_heads("l", SPEC, tokens_first).sizes == (TOKENS, HEADS, 2, WIDTH)


@pytest.mark.parametrize("kernel_tokens", [4, 8])
def test_blocks_that_a_backend_cuts_into_its_own_take_no_more_room(kernel_tokens: int) -> None:
    planned, views = caches(KVCacheLayout.LBNHC, kernel_tokens)
    pages = read_pages(views, planned, "int8")
    assert pages.row_bytes == planned_row_bytes(planned, "int8")


def test_older_engines_tensors_are_read_with_keys_and_values_as_a_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_heads, "names_kv_dimensions", lambda: False)
    page = torch.empty((NUM_BLOCKS, 2, TOKENS, HEADS, WIDTH), dtype=torch.bfloat16)
    assert (read_heads("l", SPEC, page).sizes, read_heads("l", SPEC, page).scaled) == ((2, 16, 3, 8), (0, 2))
    heads_first = page.transpose(2, 3).contiguous().transpose(2, 3)
    assert read_heads("l", SPEC, heads_first).sizes == (2, 3, 16, 8)
    cut = torch.empty((NUM_BLOCKS, 4, 2, 4, HEADS, WIDTH), dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="too scattered to compress; start without"):
        read_codec("fp8", [("l", SPEC, cut)])


def test_what_can_be_read_in_two_ways_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    square = replace(SPEC, num_kv_heads=TOKENS)
    with pytest.raises(ConfigError, match="two ways; another --block-size"):
        read_heads("l", square, torch.empty((2, 2, TOKENS, TOKENS, WIDTH), dtype=torch.bfloat16))
    page = torch.empty((2, TOKENS, TOKENS, 2 * WIDTH), dtype=torch.bfloat16)
    assert read_heads("l", square, page).groups == 2 * TOKENS  # named by the engine
    monkeypatch.setattr(kv_heads, "names_kv_dimensions", lambda: False)
    with pytest.raises(ConfigError, match="two ways"):
        read_heads("l", square, page)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, TOKENS, HEADS * 2 * WIDTH), torch.bfloat16),
        ((2, HEADS, TOKENS, WIDTH), torch.bfloat16),
        ((2, HEADS, TOKENS, 2 * WIDTH), torch.float16),
        ((2, HEADS, WIDTH // 4, TOKENS, 8), torch.bfloat16),
    ],
)
def test_pages_of_another_form_are_refused(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match="cannot be read; start without --kvbm-compression"):
        read_heads("layer.7", SPEC, torch.empty(shape, dtype=dtype))


MLA = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("spec", "groups", "words"),
    [
        (SPEC, 2, "2 groups"),
        (MLA, 1, "MLAAttentionSpec"),
        (replace(SPEC, dtype=torch.float8_e4m3fn), 1, "float8_e4m3fn already"),
        (replace(SPEC, kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD), 1, "already"),
        (replace(SPEC, head_size_v=4), 1, "different sizes"),
        (replace(SPEC, page_size_padded=4096), 1, "more in them"),
        (replace(SPEC, num_head_slots=2, state_content_bytes=HEADS * WIDTH * 2), 1, "packs its heads"),
    ],
)
def test_what_cannot_be_compressed_is_one_line_that_names_the_flag(spec: Any, groups: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        check_compressible({"layer.0": spec}, groups)
    assert "start without --kvbm-compression" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_windows_of_one_group_are_taken() -> None:
    window = SlidingWindowSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32, sliding_window=128)
    check_compressible({"layer.0": window}, 1)
    assert planned_compressed_bytes(window) == 2 * 16 * 2 * 64 + 16


def test_raw_and_compressed_rows_have_other_fingerprints() -> None:
    planned, views = caches(KVCacheLayout.LBHNC)
    assert len({read_pages(views, planned, kind).fingerprint for kind in (None, "fp8", "int8")}) == 3


def test_groups_that_no_kernel_could_take_are_refused() -> None:
    large = replace(SPEC, block_size=1024, head_size=128)
    page = torch.empty((1, HEADS, 1024, 256), dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"too large to compress; .* start without --kvbm-compression"):
        read_codec("int8", [("l", large, page)])


@pytest.mark.parametrize("layout", COMPACT)
def test_other_ranks_read_heads_that_lie_one_behind_the_other(layout: KVCacheLayout) -> None:
    planned, views = caches(layout)
    pages = read_pages(views, planned)
    in_memory = sorted(range(1, 4), key=lambda at: -views[LAYERS[0]].stride(at))
    if in_memory[0] != 1:  # [blocks, heads, tokens, both]
        assert pages.heads is None, "every token has its own heads there"
        return
    assert pages.heads is not None
    row = torch.cat([part[2] for part in pages.view.parts])
    for page, layer in zip(pages.heads.pages, LAYERS, strict=True):
        assert (page.times, page.heads) == (1, HEADS)
        for head in range(HEADS):
            start = page.offset + head * page.head_bytes
            found = row[start : start + page.head_bytes].view(torch.bfloat16)
            assert torch.equal(found.sort().values, views[layer][2, head].flatten().sort().values)


def test_nobody_takes_a_row_apart_that_holds_more_than_plain_heads() -> None:
    layout = next(layout for layout in COMPACT if read_pages(*reversed(caches(layout))).heads is not None)
    assert read_pages(*reversed(caches(layout)), "fp8").heads is None
    quantised = replace(SPEC, dtype=torch.float8_e4m3fn)
    assert kv_heads.read_head_page(quantised, torch.empty(2, HEADS, TOKENS, 2 * WIDTH), 0) is None


def test_nobody_takes_a_row_apart_whose_layers_share_some_of_their_bytes() -> None:
    planned, views = caches(KVCacheLayout.LBHNC)
    shape, page = views[LAYERS[0]].shape, views[LAYERS[0]][0].numel()
    memory = torch.zeros(NUM_BLOCKS * 2 * page, dtype=torch.bfloat16)
    strides = (2 * page, *views[LAYERS[0]].stride()[1:])
    starts = zip(LAYERS, (0, page // 2, page), strict=True)
    shared = {layer: memory.as_strided(shape, strides, start) for layer, start in starts}
    assert read_pages(shared, planned).heads is None


def test_ranks_of_the_same_pages_meet_whatever_their_number_and_no_others() -> None:
    def meets(ranks: int, **changes: Any) -> str:
        spec = replace(SPEC, **{"num_kv_heads": 4 // ranks, **changes})
        shape = (2, spec.num_kv_heads, spec.block_size, 2 * spec.head_size)
        read = kv_heads.read_head_page(spec, torch.empty(shape, dtype=spec.dtype), 0)
        assert read is not None
        return Heads((read[0],), read[1]).fingerprint(ranks)

    assert meets(1) == meets(2) == meets(4)
    wide = {"head_size": 2 * WIDTH, "head_size_v": 2 * WIDTH}
    # The last one: the same bytes in another shape.
    others = [{"dtype": torch.float16}, {"block_size": 2 * TOKENS}, {"num_kv_heads": 3}, wide, {"block_size": 8} | wide]
    assert meets(1) not in [meets(ranks, **changes) for changes in others for ranks in (1, 2)]
