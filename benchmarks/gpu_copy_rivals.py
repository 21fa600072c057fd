"""What our copy stands beside: one big memcpy, a copy a fragment, torch indexing, the 12-CTA shape, vLLM's op."""
# ruff: noqa: N803 - constexpr arguments are written in capitals, as Triton does

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from dynamo_kernels import BlockView
from dynamo_kernels.choices import Direction

Copy = Callable[[], None]


@dataclass
class Field:
    """Blocks of `parts` fragments: pages (parts, blocks, fragment) in HBM, rows (blocks, parts * fragment) pinned."""

    direction: Direction
    fragment: int
    parts: int
    hbm: torch.Tensor
    host: torch.Tensor
    hbm_ids: np.ndarray[Any, np.dtype[np.int64]]
    host_ids: np.ndarray[Any, np.dtype[np.int64]]

    @classmethod
    def of(cls, direction: Direction, fragment: int, parts: int, hbm: torch.Tensor, host: torch.Tensor) -> Field:
        """Half of all blocks, in random order on both sides."""
        blocks = hbm.numel() // (fragment * parts)
        order = np.random.default_rng(1)
        hbm_ids, host_ids = (order.permutation(blocks)[: max(1, blocks // 2)].astype(np.int64) for _ in range(2))
        return cls(direction, fragment, parts, hbm, host, hbm_ids, host_ids)

    @property
    def moved_bytes(self) -> int:
        return len(self.hbm_ids) * self.fragment * self.parts

    @property
    def loads(self) -> bool:
        return self.direction is Direction.H2D

    @property
    def pages(self) -> torch.Tensor:
        return self.hbm.view(self.parts, -1, self.fragment)

    @property
    def rows(self) -> torch.Tensor:
        return self.host.view(-1, self.parts * self.fragment)

    def views(self) -> tuple[BlockView, BlockView]:
        """(source, destination)."""
        sizes = [self.fragment] * self.parts
        pages, rows = BlockView.of_pages(self.pages.unbind(0), sizes), BlockView.of_rows(self.rows, sizes)
        return (rows, pages) if self.loads else (pages, rows)

    def ids(self) -> tuple[Any, Any]:
        """(source, destination)."""
        return (self.host_ids, self.hbm_ids) if self.loads else (self.hbm_ids, self.host_ids)

    def addresses(self) -> tuple[Any, Any]:
        """(source, destination) of every fragment, int64."""
        part = np.arange(self.parts)
        blocks = self.pages.shape[1]
        hbm = self.hbm.data_ptr() + (part * blocks + self.hbm_ids[:, None]) * self.fragment
        host = self.host.data_ptr() + (part + self.host_ids[:, None] * self.parts) * self.fragment
        return (host.ravel(), hbm.ravel()) if self.loads else (hbm.ravel(), host.ravel())

    def is_copied(self) -> bool:
        """Whether every copied block is equal on both sides."""
        there = self.pages.index_select(1, torch.from_numpy(self.hbm_ids).to(self.hbm.device)).transpose(0, 1)
        here = self.rows.index_select(0, torch.from_numpy(self.host_ids)).to(self.hbm.device)
        return torch.equal(there.reshape(here.shape), here)


def one_big_memcpy(field: Field) -> Copy:
    """The ceiling: as many bytes, in one piece on both sides."""
    size = field.moved_bytes
    if field.loads:
        return lambda: field.hbm[:size].copy_(field.host[:size], non_blocking=True)  # type: ignore[return-value]
    return lambda: field.host[:size].copy_(field.hbm[:size], non_blocking=True)  # type: ignore[return-value]


def memcpy_a_fragment(field: Field) -> Copy:
    library = ctypes.CDLL("libcuda.so.1")
    call = library.cuMemcpyHtoDAsync_v2 if field.loads else library.cuMemcpyDtoHAsync_v2
    call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    sources, targets = (each.tolist() for each in field.addresses())

    def copy() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for source, target in zip(sources, targets, strict=True):
            call(target, source, field.fragment, stream)

    return copy


def torch_indexing(field: Field) -> Copy:
    """index_select, one transfer, index_copy_; the host side gathers on the CPU."""
    on_gpu = torch.from_numpy(field.hbm_ids).to(field.hbm.device)
    on_host = torch.from_numpy(field.host_ids)
    wide_pages = field.pages.view(torch.int64)
    wide_rows = field.rows.view(torch.int64)

    def load() -> None:
        moved = wide_rows.index_select(0, on_host).to(field.hbm.device)
        wide_pages.index_copy_(1, on_gpu, moved.view(len(on_gpu), field.parts, -1).transpose(0, 1))

    def store() -> None:
        moved = wide_pages.index_select(1, on_gpu).transpose(0, 1).reshape(len(on_gpu), -1).cpu()
        wide_rows.index_copy_(0, on_host, moved)

    return load if field.loads else store


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _words_of_eight_bytes(sources, targets, words, jobs, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The shape of vLLM's kernel: addresses from a table, masked words of 8 bytes, one fragment a CTA at a time."""
    column = tl.arange(0, WORDS)
    job = tl.program_id(0)
    while job < jobs:
        source = tl.load(sources + job).to(tl.pointer_type(tl.int64))
        target = tl.load(targets + job).to(tl.pointer_type(tl.int64))
        count = tl.load(words + job)
        for start in range(0, count, WORDS):
            inside = start + column < count
            tl.store(target + start + column, tl.load(source + start + column, mask=inside, other=0), mask=inside)
        job += tl.num_programs(0)


def twelve_ctas(field: Field) -> Copy:
    device = field.hbm.device
    sources, targets = (torch.from_numpy(each).to(device) for each in field.addresses())
    words = torch.full_like(sources, field.fragment // 8)
    return partial(_words_of_eight_bytes[(12,)], sources, targets, words, len(words), WORDS=1024)


def vllm_op(field: Field) -> Copy:
    """Raises ImportError where vLLM is not installed."""
    from vllm import _custom_ops as ops

    sources, targets = (torch.from_numpy(each) for each in field.addresses())
    sizes = torch.full_like(sources, field.fragment)
    return partial(ops.swap_blocks_batch, sources, targets, sizes)


RIVALS: dict[str, Callable[[Field], Copy]] = {
    "12 CTAs, 8-byte words": twelve_ctas,
    "vLLM's own op": vllm_op,
    "memcpy a fragment": memcpy_a_fragment,
    "torch indexing": torch_indexing,
}
