"""Rows of blocks in the GPU's memory, beside the engine's pages: all layers of a block in one piece.

The engine's pages are a piece a layer: NIXL reads those at 8 GB/s, and whole rows at 181 (H200, NVLink).
"""

from __future__ import annotations

import torch

from dynamo_connectors.errors import ConfigError
from dynamo_connectors.transport.agent import Region

#: For what engines allocate after their KV cache: the graphs of decode, above all.
LEFT_FREE_BYTES = 2 * 10**9


class HbmRows:
    """`capacity_blocks` rows of `row_bytes`: of an engine that computes on a CPU in host memory, like its pages."""

    def __init__(self, capacity_blocks: int, row_bytes: int, device: torch.device) -> None:
        """Raises `ConfigError` when the GPU has not so much memory left."""
        self.capacity_blocks, self.row_bytes = capacity_blocks, row_bytes
        wanted = capacity_blocks * row_bytes
        if device.type == "cuda" and (free := torch.cuda.mem_get_info(device)[0]) < wanted + LEFT_FREE_BYTES:
            raise ConfigError(
                f"--kvbm-peer-hbm-gb wants {wanted / 1e9:.2f} GB beside the engine's memory, and {free / 1e9:.2f} are "
                f"free, of which {LEFT_FREE_BYTES / 1e9:g} stay so; lower it, or --gpu-memory-utilization"
            )
        self.rows = torch.empty((capacity_blocks, row_bytes), dtype=torch.uint8, device=device)

    @property
    def region(self) -> Region:
        device = self.rows.device
        return Region(self.rows.data_ptr(), self.rows.nbytes, device.index if device.type == "cuda" else None)

    def buffer(self, row: int) -> int:
        """Where a row begins."""
        return int(self.rows.data_ptr()) + row * self.row_bytes

    def close(self) -> None:
        """Whoever reads or fills the rows has ended."""
        self.rows = torch.empty((0, self.row_bytes), dtype=torch.uint8)
