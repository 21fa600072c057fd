"""How an engine's KV cache lies in memory, as plain numbers: opaque pages per (layer, block), never shapes.

A page is `page_bytes` at `base + stride_bytes * block_id`. A host row holds the pages of one block, layer after layer,
so that one block is one contiguous range in every tier below HBM.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_connectors.errors import UnsupportedLayoutError


@dataclass(frozen=True)
class PageLayout:
    """One layer's pages. `base_bytes` is the offset of block 0 in the layer's storage."""

    layer: str
    num_blocks: int
    base_bytes: int
    stride_bytes: int
    page_bytes: int
    #: (size, stride in elements) of every dimension inside a page, in the engine's order: two pages of equal size may
    #: still be read in different orders (NHD, HND).
    order: tuple[tuple[int, int], ...] = ()


def page_layout(
    layer: str, shape: tuple[int, ...], strides: tuple[int, ...], item_bytes: int, base_bytes: int
) -> PageLayout:
    """The pages of one KV tensor whose first dimension is the block.

    `strides` are in elements, as torch gives them. Raises `UnsupportedLayoutError` when a page is not one dense range
    of bytes: copying it as opaque bytes would then copy somebody else's.
    """
    if len(shape) < 2 or 0 in shape:
        raise UnsupportedLayoutError(
            f"layer {layer}: shape {shape} has no block dimension, or blocks without bytes; this model cannot be tiered"
        )
    page_elements = 1
    for size in shape[1:]:
        page_elements *= size
    dense = 1
    for size, stride in sorted(zip(shape[1:], strides[1:], strict=True), key=lambda pair: (pair[1], pair[0])):
        if size == 1:
            continue
        if stride != dense:
            raise UnsupportedLayoutError(
                f"layer {layer}: the bytes of one block are scattered (shape {shape}, strides {strides}); "
                "choose a block-contiguous KV cache layout (VLLM_KV_CACHE_LAYOUT)"
            )
        dense *= size
    if shape[0] > 1 and strides[0] < page_elements:
        raise UnsupportedLayoutError(f"layer {layer}: blocks overlap (shape {shape}, strides {strides})")
    return PageLayout(
        layer=layer,
        num_blocks=shape[0],
        base_bytes=base_bytes,
        stride_bytes=strides[0] * item_bytes,
        page_bytes=page_elements * item_bytes,
        order=tuple((size, stride) for size, stride in zip(shape[1:], strides[1:], strict=True) if size != 1),
    )
