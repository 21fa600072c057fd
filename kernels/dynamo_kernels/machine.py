"""What a copy plan runs on: a GPU's copy engines, its kernels and two streams of our own.

Plans only ever talk to a `Machine`, so that tests can run them without a GPU: with the host's memory for HBM, and with
streams that write down in which order work was allowed to run.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dynamo_kernels.dma import Fragments
from dynamo_kernels.driver import copy_driver
from dynamo_kernels.geometry import TILE_BYTES, WORD_BYTES, Addresses, Band


class Kernel(Enum):
    """Which copy kernel: the pipeline across PCIe, or the burst inside HBM."""

    PIPELINED = "pipelined"
    DIRECT = "direct"


@dataclass(frozen=True)
class KernelCopy:
    """One launch: these blocks of a band. `tables` is what `Machine.tables` gave for the band; 0 CTAs are all SMs."""

    kernel: Kernel
    band: Band
    tables: Any
    #: (2, blocks) int32, source and destination, as `Machine.upload` gave them.
    ids: Any
    ctas: int


class Machine(Protocol):
    """Streams are duck-typed after `torch.cuda.Stream`."""

    dma: Any
    kernels: Any

    def current(self) -> Any: ...
    def copy_fragments(self, table: Fragments, stream: Any) -> None: ...
    def copy_lines(self, table: NDArray[Any], stream: Any) -> None: ...
    def tables(self, band: Band) -> Any: ...
    def upload(self, src_ids: Addresses, dst_ids: Addresses, stream: Any) -> Any: ...
    def launch(self, copy: KernelCopy, stream: Any) -> None: ...
    def staging(self, size: int) -> tuple[int, Any]: ...


class _Address:
    """A bare address where Triton expects a tensor; pinned host memory has the same one on both sides."""

    dtype = torch.int64

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


class CudaMachine:
    """One GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._driver = copy_driver()
        # The engine's stream keeps the lower priority value 0: a copy that few CTAs make must not wait for slots.
        self.dma: Any = torch.cuda.Stream(device, priority=-1)
        self.kernels: Any = torch.cuda.Stream(device, priority=-1)
        self.multiprocessors = int(torch.cuda.get_device_properties(device).multi_processor_count)

    def current(self) -> Any:
        return torch.cuda.current_stream(self.device)

    def copy_fragments(self, table: Fragments, stream: Any) -> None:
        self._driver.copy_fragments(table, stream.cuda_stream)

    def copy_lines(self, table: NDArray[Any], stream: Any) -> None:
        self._driver.copy_lines(table, stream.cuda_stream)

    def tables(self, band: Band) -> Any:
        """The part offsets of both sides, in words, on the device: uploaded once a plan."""
        words = np.stack([band.src.offsets, band.dst.offsets]) // WORD_BYTES
        return torch.from_numpy(words).to(self.device)

    def staging(self, size: int) -> tuple[int, Any]:
        memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        return memory.data_ptr(), memory

    def upload(self, src_ids: Addresses, dst_ids: Addresses, stream: Any) -> Any:
        on_stream: AbstractContextManager[Any] = torch.cuda.stream(stream)
        with on_stream:
            ids = torch.from_numpy(np.stack([src_ids, dst_ids]).astype(np.int32))
            # Pinned through torch's own allocator, which keeps the buffer until the stream has read it.
            return ids.pin_memory().to(self.device, non_blocking=True)

    def launch(self, copy: KernelCopy, stream: Any) -> None:
        on_stream: AbstractContextManager[Any] = torch.cuda.stream(stream)
        with on_stream:
            ctas = copy.ctas or self.multiprocessors
            launch(replace(copy, ctas=ctas), _Address(copy.band.src.first), _Address(copy.band.dst.first))


#: Tiles in flight plus one. 80 KiB from each CTA; 13 stages were no faster (H200, 2026-11-22).
_STAGES = 6


def launch(copy: KernelCopy, src: Any, dst: Any) -> None:
    """Launches `copy` on the current stream, or in Triton's interpreter. `src` and `dst` lie at the sides' `first`."""
    from dynamo_kernels import triton_copy

    band = copy.band
    chunk_bytes = band.chunk_bytes
    per_part = band.part_bytes // chunk_bytes
    chunks = copy.ids.shape[1] * band.parts * per_part
    rows = TILE_BYTES // chunk_bytes
    grid = (min(copy.ctas, -(-chunks // rows)),)
    pipelined = copy.kernel is Kernel.PIPELINED
    kernel = triton_copy.pipelined if pipelined else triton_copy.direct
    kernel[grid](
        src, dst, copy.tables[0], copy.tables[1], copy.ids[0], copy.ids[1], chunks, band.parts, per_part,
        band.src.stride // WORD_BYTES, band.dst.stride // WORD_BYTES,
        ROWS=rows, WORDS=chunk_bytes // 8, STAGES=_STAGES if pipelined else 1, num_warps=8,
    )  # fmt: skip
