"""Page-locks host memory, so that the GPU can copy to and from it by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dynamo_connectors.errors import ConfigError

#: One registration of the whole slab would hold the driver's lock for seconds.
_CHUNK_BYTES = 16 << 30


def pin_host_memory(address: int, num_bytes: int) -> Callable[[], None]:
    """Pins [address, address + num_bytes) in chunks; the returned function unpins it.

    Raises `ConfigError` when the driver refuses, with nothing left pinned.
    """
    runtime = torch.cuda.cudart()
    pinned: list[int] = []

    def unpin() -> None:
        while pinned:
            runtime.cudaHostUnregister(pinned.pop())

    for offset in range(0, num_bytes, _CHUNK_BYTES):
        size = min(_CHUNK_BYTES, num_bytes - offset)
        code = int(runtime.cudaHostRegister(address + offset, size, 0))
        if code != 0:
            unpin()
            raise ConfigError(
                f"the GPU driver cannot pin {num_bytes / 1e9:.2f} GB of host memory (CUDA error {code}); "
                "lower --kvbm-host-dram-gb or raise the memlock limit (ulimit -l)"
            )
        pinned.append(address + offset)
    return unpin
