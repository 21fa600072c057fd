"""Which blocks may go down a tier at all. Pure arithmetic."""

from __future__ import annotations

import math


def admitted_blocks(full_blocks: int, offload_ratio: float) -> int:
    """How many of a request's first `full_blocks` blocks may be offloaded under `--kvbm-offload-ratio`.

    Always a prefix: a block can only be used again when all blocks before it are there too.
    """
    return min(full_blocks, math.ceil(full_blocks * offload_ratio - 1e-9))
