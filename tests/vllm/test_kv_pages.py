"""Reading KV caches that vLLM's own code lays out, over all its layouts, copied and read back through vLLM's views."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from dynamo_kernels.block_view import BlockView
from dynamo_kernels.copy import copy_blocks
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    SlidingWindowSpec,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from dynamo_connectors.errors import UnsupportedLayoutError
from dynamo_connectors.vllm.kv_pages import planned_row_bytes, read_geometry, read_pages

SHAPE: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": 8, "dtype": torch.bfloat16}
NUM_BLOCKS = 7
#: The shorter second group leaves part of each block unused.
GROUPS = [
    KVCacheGroupSpec(["full.0", "full.1"], FullAttentionSpec(**SHAPE)),
    KVCacheGroupSpec(["window.0"], SlidingWindowSpec(**SHAPE, sliding_window=32)),
]


def caches(layout: KVCacheLayout) -> tuple[Any, dict[str, torch.Tensor]]:
    """A KV cache of random bytes as vLLM would plan and view it."""
    cache_config = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: layout,
        num_gpu_blocks_override=NUM_BLOCKS,
        prefix_cache_retention_interval=None,
    )
    config = SimpleNamespace(cache_config=cache_config, attention_config=SimpleNamespace(hisparse_config=None))
    planned = get_kv_cache_config_from_groups(config, GROUPS, 1 << 30)  # type: ignore[arg-type]
    raw = torch.randint(-128, 127, (planned.kv_cache_tensors[0].size,), dtype=torch.int8)
    views = {}
    for tensor in planned.kv_cache_tensors:
        (group,) = [group for group in GROUPS if tensor.layers[0] in group.layer_names]
        made = create_kv_cache_views(raw, group.kv_cache_spec, NUM_BLOCKS, layout, tensor)
        views.update(zip(tensor.layers, made, strict=True))
    return planned, views


#: Here the heads of one page lie far apart: it is no dense range of bytes.
SCATTERED = {layout for layout in KVCacheLayout if not layout.is_block_compact}


@pytest.mark.parametrize("layout", list(KVCacheLayout), ids=lambda layout: layout.name)
def test_a_block_comes_back_whole_for_every_group_that_owns_it(layout: KVCacheLayout) -> None:
    planned, views = caches(layout)
    try:
        pages = read_pages(views, planned)
    except UnsupportedLayoutError:
        assert layout in SCATTERED
        return
    assert layout not in SCATTERED
    assert pages.row_bytes <= planned_row_bytes(planned)
    rows = BlockView.of_rows(torch.zeros((3, pages.row_bytes), dtype=torch.uint8), pages.view.part_bytes)
    before = {layer: view.clone() for layer, view in views.items()}
    copy_blocks(pages.view, [4], rows, [1])
    copy_blocks(rows, [1], pages.view, [2])
    for layer, view in views.items():
        same = view.view(torch.int16), before[layer].view(torch.int16)
        assert torch.equal(same[0][2], same[1][4]), layer
        for other in (0, 1, 3, 4, 5, 6):
            assert torch.equal(same[0][other], same[1][other]), f"{layer} block {other} changed"


def test_groups_are_read_with_their_windows() -> None:
    planned, _ = caches(next(iter(set(KVCacheLayout) - SCATTERED)))
    geometry = read_geometry(planned)
    assert [(group.block_tokens, group.window_tokens) for group in geometry.groups] == [(16, None), (16, 32)]


def test_the_fingerprint_tells_apart_what_a_row_means_and_nothing_else() -> None:
    """Where blocks and layers lie does not matter to a row; the order of heads and tokens in a page does."""
    prints: dict[bool, set[str]] = {True: set(), False: set()}
    for layout in set(KVCacheLayout) - SCATTERED:
        planned, views = caches(layout)
        heads_first = layout.name.index("H") < layout.name.index("N")
        prints[heads_first].add(read_pages(views, planned).fingerprint)
    assert [len(found) for found in prints.values()] == [1, 1]
    assert prints[True] != prints[False]
