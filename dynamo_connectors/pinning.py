"""Page-locks host memory, so that the GPU can copy to and from it by itself."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from typing import Protocol

import torch

from dynamo_connectors.errors import ConfigError

#: One registration of everything would hold the driver's lock for seconds.
MAX_CHUNK_BYTES = 64 << 30


class Registrar(Protocol):
    """What locks and unlocks a range of memory."""

    def register(self, address: int, num_bytes: int) -> str | None:
        """None, or why not in a few words."""

    def unregister(self, address: int, num_bytes: int) -> None: ...


class CudaRegistrar:
    """The GPU driver, through the runtime that torch has loaded."""

    def register(self, address: int, num_bytes: int) -> str | None:
        runtime = torch.cuda.cudart()
        code = runtime.cudaHostRegister(address, num_bytes, 0)
        return None if int(code) == 0 else f"CUDA error {int(code)}, {runtime.cudaGetErrorString(code)}"

    def unregister(self, address: int, num_bytes: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)


def pin_host_memory(
    address: int, num_bytes: int, row_bytes: int, registrar: Registrar | None = None
) -> Callable[[], None]:
    """Pins [address, address + num_bytes) in chunks of whole rows and pages; the returned function unpins it.

    Raises `ConfigError` when a chunk is refused, with nothing left pinned.
    """
    driver = registrar if registrar is not None else CudaRegistrar()
    pinned: list[tuple[int, int]] = []

    def unpin() -> None:
        while pinned:
            driver.unregister(*pinned.pop())

    step = chunk_bytes(row_bytes)
    for offset in range(0, num_bytes, step):
        chunk = (address + offset, min(step, num_bytes - offset))
        try:
            refusal = driver.register(*chunk)
        except BaseException:
            unpin()
            raise
        if refusal is not None:
            done = sum(size for _, size in pinned)
            unpin()
            raise ConfigError(
                f"{num_bytes / 1e9:.2f} GB of host memory cannot be pinned, only {done / 1e9:.2f} GB ({refusal}); "
                "lower --kvbm-host-dram-gb or raise the memlock limit (ulimit -l)"
            )
        pinned.append(chunk)
    return unpin


def chunk_bytes(row_bytes: int, most_bytes: int = MAX_CHUNK_BYTES) -> int:
    """The largest chunk that splits neither a row nor a page, so that no copy crosses two registrations."""
    unit = math.lcm(row_bytes, mmap.PAGESIZE)
    return max(1, most_bytes // unit) * unit
