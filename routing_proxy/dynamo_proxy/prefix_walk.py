"""One walk over a chain scores every engine: the index maps a node to a bitmask of the engines that hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def leading_runs(holders_of: Mapping[int, int], chain: Sequence[int], mask: int) -> dict[int, int]:
    """How many leading nodes of `chain` each engine of `mask` holds (engines with none are left out)."""
    found: dict[int, int] = {}
    live = mask
    for depth, node in enumerate(chain):
        holders = holders_of.get(node, 0) & live
        if holders != live:
            _note(found, live & ~holders, depth)
            live = holders
            if not live:
                return found
    _note(found, live, len(chain))
    return found


def _note(found: dict[int, int], mask: int, depth: int) -> None:
    while mask and depth:
        low = mask & -mask
        found[low.bit_length() - 1] = depth
        mask ^= low
