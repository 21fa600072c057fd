"""`copy_blocks`: the torch reference. It defines the result that every faster path must reproduce bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynamo_kernels.block_view import BlockView
from dynamo_kernels.errors import CopyError

#: Widest first: eight bytes at a time instead of one, wherever the addresses allow it.
_WIDE_DTYPES = (torch.int64, torch.int32, torch.int16)


def copy_blocks(src: BlockView, src_ids: Sequence[int], dst: BlockView, dst_ids: Sequence[int]) -> None:
    """Copies block `src_ids[i]` of `src` over block `dst_ids[i]` of `dst`, every part, as opaque bytes.

    The views may live on different devices. When the call returns, the bytes are in place for the host and for the
    current stream. Raises `CopyError` before anything is copied when an id is out of range, a destination is named
    twice, or the parts differ in size.
    """
    _validate(src, src_ids, dst, dst_ids)
    if not src_ids:
        return
    source_index = torch.tensor(src_ids, dtype=torch.int64, device=src.device)
    target_index = torch.tensor(dst_ids, dtype=torch.int64, device=dst.device)
    for source, target in zip(src.parts, dst.parts, strict=True):
        wide_source, wide_target = _widened(source, target)
        moved = wide_source.index_select(0, source_index).to(dst.device)
        wide_target.index_copy_(0, target_index, moved)


def _validate(src: BlockView, src_ids: Sequence[int], dst: BlockView, dst_ids: Sequence[int]) -> None:
    if len(src_ids) != len(dst_ids):
        raise CopyError(f"{len(src_ids)} source blocks for {len(dst_ids)} destinations")
    if src.part_bytes != dst.part_bytes:
        raise CopyError(f"parts differ: source {src.part_bytes} bytes, destination {dst.part_bytes}")
    for name, ids, count in (("source", src_ids, src.num_blocks), ("destination", dst_ids, dst.num_blocks)):
        for block in ids:
            if not 0 <= block < count:
                raise CopyError(f"{name} block {block} is outside 0..{count - 1}")
    if len(set(dst_ids)) != len(dst_ids):
        raise CopyError("a destination block is named twice")


def _widened(source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both parts as the widest integers that their size, strides and addresses allow."""
    for dtype in _WIDE_DTYPES:
        width = dtype.itemsize
        if all(
            part.shape[1] % width == 0
            and part.stride(0) % width == 0
            and part.storage_offset() % width == 0
            and part.data_ptr() % width == 0
            for part in (source, target)
        ):
            return source.view(dtype), target.view(dtype)
    return source, target
