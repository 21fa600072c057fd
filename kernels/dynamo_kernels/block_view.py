"""A set of blocks as bytes: the same block ids index every part, and a part is one layer's pages.

HBM pages: one part per layer, each anywhere in memory. Host rows: one tensor cut into columns, one per layer. Copying
between the two is the same loop in both directions, and nobody looks at shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dynamo_kernels.errors import CopyError


@dataclass(frozen=True)
class BlockView:
    """`parts[i]` is a (num_blocks, part_bytes_i) uint8 tensor whose rows are dense; rows may be far apart."""

    parts: tuple[torch.Tensor, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise CopyError("a view needs at least one part")
        for part in self.parts:
            if part.dtype != torch.uint8 or part.dim() != 2 or (part.shape[1] > 1 and part.stride(1) != 1):
                raise CopyError(f"a part must be (blocks, bytes) uint8 with dense rows, not {part.dtype} {part.shape}")

    @property
    def num_blocks(self) -> int:
        return min(int(part.shape[0]) for part in self.parts)

    @property
    def part_bytes(self) -> tuple[int, ...]:
        return tuple(part.shape[1] for part in self.parts)

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @classmethod
    def of_pages(cls, tensors: Sequence[torch.Tensor], page_bytes: Sequence[int]) -> BlockView:
        """The pages of KV tensors whose first dimension is the block and whose pages are dense ranges of bytes.

        The caller has proved both (`dynamo_connectors.layout.page_layout`): shapes are not interpreted here.
        """
        return cls(tuple(_as_bytes(tensor, size) for tensor, size in zip(tensors, page_bytes, strict=True)))

    @classmethod
    def of_rows(cls, rows: torch.Tensor, part_bytes: Sequence[int]) -> BlockView:
        """Host rows, (slots, sum(part_bytes)) uint8, cut into one column per part."""
        if rows.dim() != 2 or rows.shape[1] != sum(part_bytes):
            raise CopyError(f"rows of shape {tuple(rows.shape)} do not hold parts of {sum(part_bytes)} bytes in all")
        return cls(tuple(rows.split(list(part_bytes), dim=1)))


def _as_bytes(tensor: torch.Tensor, page_bytes: int) -> torch.Tensor:
    item = tensor.element_size()
    storage = tensor.untyped_storage()
    start, stride = tensor.storage_offset() * item, tensor.stride(0) * item
    # `set_` would quietly grow the storage, and so move the engine's KV cache away from under it.
    if start + (tensor.shape[0] - 1) * stride + page_bytes > storage.nbytes():
        raise CopyError(f"pages of {page_bytes} bytes reach beyond the storage of a tensor {tuple(tensor.shape)}")
    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return raw.set_(storage, start, (tensor.shape[0], page_bytes), (stride, 1))
