"""Blocks in plain memory: how they may lie, and the copy that nobody can get wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from dynamo_kernels import BlockView

CANARY = 0xA5


@dataclass
class Arena:
    """Parts cut out of one allocation each, `offset` bytes in and `stride` bytes apart, canaries everywhere else."""

    view: BlockView
    allocations: list[torch.Tensor]
    offset: int
    stride: int

    def images(self) -> list[bytearray]:
        return [bytearray(allocation.numpy().tobytes()) for allocation in self.allocations]


def arena(blocks: int, sizes: Sequence[int], offset: int, gap: int, seed: int) -> Arena:
    generator = torch.Generator().manual_seed(seed)
    stride = max(sizes) + gap
    allocations, parts = [], []
    for size in sizes:
        memory = torch.full((offset + blocks * stride + 64,), CANARY, dtype=torch.uint8)
        part = memory.as_strided((blocks, size), (stride, 1), offset)
        part.copy_(torch.randint(0, 256, (blocks, size), dtype=torch.uint8, generator=generator))
        allocations.append(memory)
        parts.append(part)
    return Arena(BlockView(tuple(parts)), allocations, offset, stride)


def naive_copy(src: Arena, src_ids: Sequence[int], dst: Arena, dst_ids: Sequence[int]) -> list[bytearray]:
    """What the destination's allocations must be afterwards, byte by byte."""
    sources, targets = src.images(), dst.images()
    for source, target, size in zip(sources, targets, src.view.part_bytes, strict=True):
        for source_id, target_id in zip(src_ids, dst_ids, strict=True):
            for byte in range(size):
                value = source[src.offset + source_id * src.stride + byte]
                target[dst.offset + target_id * dst.stride + byte] = value
    return targets
