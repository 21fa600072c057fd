"""Which blocks may go down a tier at all. Pure arithmetic."""

from __future__ import annotations

import math

from dynamo_connectors.blocks import BlockKey

_HALVED = bytes(value // 2 for value in range(256))
_MOST = 255


def admitted_blocks(full_blocks: int, offload_ratio: float) -> int:
    """How many of a request's first `full_blocks` blocks may be offloaded under `--kvbm-offload-ratio`.

    Always a prefix: a block can only be used again when all blocks before it are there too.
    """
    return min(full_blocks, math.ceil(full_blocks * offload_ratio - 1e-9))


class TouchSketch:
    """About how often a block was used that no tier holds, in 8 bytes per block that it is made for.

    A count-min sketch of two rows: never too low while young, seldom too high. It ages: after as many uses as a row has
    counters all counts are halved, so a block that was used once, long ago, is forgotten.
    """

    def __init__(self, capacity_blocks: int) -> None:
        width = 1 << max(6, (4 * capacity_blocks - 1).bit_length())
        self._mask = width - 1
        self._shift = width.bit_length() - 1
        self._rows = (bytearray(width), bytearray(width))
        self._uses_left = width

    def use(self, key: BlockKey) -> None:
        one, two = self._rows
        mixed = hash(key)
        first, second = mixed & self._mask, (mixed >> self._shift) & self._mask
        least = min(one[first], two[second])
        if least < _MOST:
            # Only the lower counter grows: the other one is higher because of somebody else.
            if one[first] == least:
                one[first] += 1
            if two[second] == least:
                two[second] += 1
        self._uses_left -= 1
        if not self._uses_left:
            self._rows = (one.translate(_HALVED), two.translate(_HALVED))
            self._uses_left = len(one)

    def uses(self, key: BlockKey) -> int:
        one, two = self._rows
        mixed = hash(key)
        return min(one[mixed & self._mask], two[(mixed >> self._shift) & self._mask])
