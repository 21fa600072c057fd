"""Block copy: moves opaque KV bytes between HBM pages and host rows.

`copy_blocks` is the one call. Importing this package costs nothing; torch comes with the first name that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamo_kernels.block_view import BlockView
    from dynamo_kernels.calibration import calibrate
    from dynamo_kernels.copy import copy_blocks, decisions
    from dynamo_kernels.fence import ComputeFence, CopyLane, SideStream

__all__ = ["BlockView", "ComputeFence", "CopyLane", "SideStream", "calibrate", "copy_blocks", "decisions"]

_HOME = {
    "BlockView": "block_view",
    "ComputeFence": "fence",
    "CopyLane": "fence",
    "SideStream": "fence",
    "calibrate": "calibration",
    "copy_blocks": "copy",
    "decisions": "copy",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
