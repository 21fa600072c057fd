"""What a copy plan runs on: a GPU's copy engines, its kernels and two streams of our own.

Plans only ever talk to a `Machine`, so that tests can run them without a GPU: with the host's memory for HBM, and with
streams that write down in which order work was allowed to run.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dynamo_kernels.dma import Fragments
from dynamo_kernels.driver import copy_driver
from dynamo_kernels.geometry import LINE_BYTES, TILE_BYTES, WORD_BYTES, Addresses, Band


class Kernel(Enum):
    """Which copy kernel: the pipeline across PCIe, the same by TMA, or the burst inside HBM."""

    PIPELINED = "pipelined"
    TMA = "through_tma"
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
    has_tma: bool

    def current(self) -> Any: ...
    def copy_fragments(self, table: Fragments, stream: Any) -> None: ...
    def copy_lines(self, table: NDArray[Any], stream: Any) -> None: ...
    def tables(self, band: Band) -> Any: ...
    def upload(self, src_ids: Addresses, dst_ids: Addresses, stream: Any) -> Any: ...
    def launch(self, copy: KernelCopy, stream: Any) -> None: ...
    def staging(self, size: int) -> tuple[int, Any]: ...


@dataclass(frozen=True)
class _Address:
    """A bare address where Triton expects a tensor; pinned host memory has the same one on both sides."""

    address: int
    dtype: ClassVar[torch.dtype] = torch.int64

    def data_ptr(self) -> int:
        return self.address


#: The first with a tensor memory accelerator (Hopper).
_FIRST_WITH_TMA = (9, 0)


class CudaMachine:
    """One GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._driver = copy_driver()
        # The engine's stream keeps the lower priority value 0: a copy that few CTAs make must not wait for slots.
        self.dma: Any = torch.cuda.Stream(device, priority=-1)
        self.kernels: Any = torch.cuda.Stream(device, priority=-1)
        capable = torch.cuda.get_device_capability(device) >= _FIRST_WITH_TMA
        self.has_tma = capable and find_spec("triton.tools.tensor_descriptor") is not None
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
_STAGES = {Kernel.PIPELINED: 6, Kernel.TMA: 6, Kernel.DIRECT: 1}


def launch(copy: KernelCopy, src: Any, dst: Any) -> None:
    """Launches `copy` on the current stream, or in Triton's interpreter. `src` and `dst` lie at the sides' `first`."""
    from dynamo_kernels import triton_copy

    band = copy.band
    chunk_bytes = band.chunk_bytes
    per_part = band.part_bytes // chunk_bytes
    chunks = copy.ids.shape[1] * band.parts * per_part
    rows = TILE_BYTES // chunk_bytes
    grid = (min(copy.ctas, -(-chunks // rows)),)
    kernel, stages = getattr(triton_copy, copy.kernel.value), _STAGES[copy.kernel]
    if copy.kernel is Kernel.TMA:
        src, dst = (_as_lines(at, band.lines(side)) for at, side in ((src, band.src), (dst, band.dst)))
        settings = {"LINES": TILE_BYTES // LINE_BYTES, "num_warps": 4}
    else:
        settings = {"ROWS": rows, "WORDS": chunk_bytes // 8, "num_warps": 8}
    kernel[grid](
        src, dst, copy.tables[0], copy.tables[1], copy.ids[0], copy.ids[1], chunks, band.parts, per_part,
        band.src.stride // WORD_BYTES, band.dst.stride // WORD_BYTES, STAGES=stages, **settings,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _as_lines(at: Any, lines: int) -> Any:
    """A side as TMA sees it, described once (14 us). Triton has the driver encode it when it launches, for which the
    calling thread must have a context: uploading the ids has given it one."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[import-untyped, unused-ignore]

    words = LINE_BYTES // 8
    return TensorDescriptor(at, [lines, words], [words, 1], [TILE_BYTES // LINE_BYTES, words])
