"""The copy in plain torch. It defines the result that every faster path must reproduce bit for bit."""

from __future__ import annotations

import torch

from dynamo_kernels.block_view import BlockView
from dynamo_kernels.ids import Ids

#: Widest first: eight bytes at a time instead of one, wherever the addresses allow it.
_WIDE_DTYPES = (torch.int64, torch.int32, torch.int16)


def copy_by_torch(src: BlockView, src_ids: Ids, dst: BlockView, dst_ids: Ids) -> None:
    """Copies checked ids, part by part, whatever memory the views lie in. The bytes are in place when it returns."""
    source_index = torch.from_numpy(src_ids).to(src.device)
    target_index = torch.from_numpy(dst_ids).to(dst.device)
    for source, target in zip(src.parts, dst.parts, strict=True):
        wide_source, wide_target = _widened(source, target)
        moved = wide_source.index_select(0, source_index).to(dst.device)
        wide_target.index_copy_(0, target_index, moved)


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
