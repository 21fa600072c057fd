"""A machine made of host memory: copies happen at once, by address, and the streams write down what was enqueued."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from dynamo_kernels.dma import LINE_COPY, ORDER_STREAM, Fragments
from dynamo_kernels.geometry import WORD_BYTES, Addresses, Band
from dynamo_kernels.machine import Kernel, KernelCopy
from numpy.typing import NDArray

from tests.kernels.stream_order import Stream, Tape

#: An address stands for the bytes from it on: every copy of an order test is a multiple of this.
GRAIN = 16


class FakeMachine:
    """`run_kernel` replaces the plain loop that stands for the kernels (the interpreter's tests do)."""

    def __init__(self, tape: Tape | None = None, run_kernel: Callable[[KernelCopy], None] | None = None) -> None:
        self.tape = tape or Tape()
        self.compute, self.dma, self.kernels = self.tape.stream(), self.tape.stream(), self.tape.stream()
        self.calls: list[str] = []
        self.has_tma = True
        self._run_kernel = run_kernel or copy_plainly

    def current(self) -> Stream:
        return self.compute

    def tables(self, band: Band) -> torch.Tensor:
        return torch.from_numpy(np.stack([band.src.offsets, band.dst.offsets]) // WORD_BYTES)

    def staging(self, size: int) -> tuple[int, torch.Tensor]:
        memory = torch.zeros(size + WORD_BYTES, dtype=torch.uint8)
        return -(-memory.data_ptr() // WORD_BYTES) * WORD_BYTES, memory

    def copy_fragments(self, table: Fragments, stream: Stream) -> None:
        moves = list(zip(table.srcs.tolist(), table.dsts.tolist(), table.sizes.tolist(), strict=True))
        self._move("fragments", moves, stream)

    def copy_lines(self, table: NDArray[Any], stream: Stream) -> None:
        assert table.dtype == LINE_COPY
        moves = []
        for copy in table:
            assert (copy["order"], copy["depth"]) == (ORDER_STREAM, 1)
            for line in range(int(copy["lines"])):
                src, dst = (int(copy[side]["ptr"] + line * copy[side]["row"]) for side in ("src", "dst"))
                moves.append((src, dst, int(copy["width"])))
        self._move("lines", moves, stream)

    def upload(self, src_ids: Addresses, dst_ids: Addresses, stream: Stream) -> torch.Tensor:
        return torch.from_numpy(np.stack([src_ids, dst_ids]).astype(np.int32))

    def launch(self, copy: KernelCopy, stream: Stream) -> None:
        self.calls.append(copy.kernel.value)
        sources, targets = fragment_addresses(copy)
        stream.work(copy.kernel.value, _grains(copy, sources), _grains(copy, targets))
        self._run_kernel(copy)

    def _move(self, name: str, moves: Iterable[tuple[int, int, int]], stream: Stream) -> None:
        moves = list(moves)
        self.calls.append(name)
        reads = {at for src, _, size in moves for at in range(src, src + size, GRAIN)}
        writes = {at for _, dst, size in moves for at in range(dst, dst + size, GRAIN)}
        stream.work(name, reads, writes)
        for src, dst, size in moves:
            ctypes.memmove(dst, src, size)


def fragment_addresses(copy: KernelCopy) -> tuple[Addresses, Addresses]:
    sources, targets = copy.ids.numpy().astype(np.int64)
    return copy.band.src.addresses(sources).ravel(), copy.band.dst.addresses(targets).ravel()


def _grains(copy: KernelCopy, addresses: Addresses) -> set[int]:
    return {int(at) + step for at in addresses for step in range(0, copy.band.part_bytes, GRAIN)}


def copy_plainly(copy: KernelCopy) -> None:
    """What a kernel must do."""
    assert copy.kernel in Kernel
    sources, targets = fragment_addresses(copy)
    for src, dst in zip(sources.tolist(), targets.tolist(), strict=True):
        ctypes.memmove(dst, src, copy.band.part_bytes)


def memory_at(address: int, num_bytes: int) -> torch.Tensor:
    """The int64 words that lie there: how the interpreter is handed an address."""
    return torch.frombuffer((ctypes.c_char * num_bytes).from_address(address), dtype=torch.int64)
