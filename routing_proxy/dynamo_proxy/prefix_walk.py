"""One walk over a chain scores every engine: the index maps a node to a bitmask of the engines that hold it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_STRIDE: Final = 32


def leading_runs(holders_of: dict[int, int], chain: Sequence[int], mask: int) -> dict[int, int]:
    """How many leading nodes of `chain` each engine of `mask` holds (engines with none are left out).

    Whoever holds a node holds what leads to it (engines evict leaves first), so a stride whose last node all of them
    hold is taken in one look.
    """
    found: dict[int, int] = {}
    live, depth, count = mask, 0, len(chain)
    while depth < count:
        stride = depth + _STRIDE
        if stride <= count and holders_of.get(chain[stride - 1], 0) & live == live:
            depth = stride
            continue
        for node in chain[depth:stride]:
            holders = holders_of.get(node, 0) & live
            if holders != live:
                _note(found, live & ~holders, depth)
                live = holders
                if not live:
                    return found
            depth += 1
    _note(found, live, count)
    return found


def _note(found: dict[int, int], mask: int, depth: int) -> None:
    while mask and depth:
        low = mask & -mask
        found[low.bit_length() - 1] = depth
        mask ^= low
