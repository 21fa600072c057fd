"""Which engine was sent which prompt text: one bounded LRU of text-chain nodes per engine, one walk for all
engines. Capacities are in units of the chain (text_chain.py), so that a coarse node counts for what it covers.

With the engine's true capacity this routes as well as exact knowledge (one router); an unbounded one does
not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from .prefix_walk import leading_runs
from .text_chain import node_units

DEFAULT_CAPACITY_UNITS = 8192  # about 500k tokens at four bytes a token
# A node that was touched so short a while ago stays where it is in the order, and so does what leads to it. It is at
# most this part of the age of the oldest node: whoever stays behind must not be forgotten much sooner for it.
_FRESH_SECONDS, _FRESH_PART = 1.0, 1 / 8


class ApproxIndex:
    """node -> bitmask of the engines that were sent it, and per engine the order in which to forget."""

    def __init__(self, default_capacity_units: int = DEFAULT_CAPACITY_UNITS) -> None:
        self._default = default_capacity_units
        self._masks: dict[int, int] = {}
        self._orders: dict[int, OrderedDict[int, float]] = {}
        self._capacity: dict[int, int] = {}
        self._units: dict[int, int] = {}  # held per engine

    def __len__(self) -> int:
        return len(self._masks)

    def set_capacity(self, slot: int, units: int) -> None:
        self._capacity[slot] = max(1, units)
        self._trim(slot)

    def insert(self, slot: int, chain: Sequence[int], now: float) -> None:
        """Engine `slot` was sent this chain. The deepest node is touched first, so that it is forgotten first; none is
        marked as touched later than what leads to it.
        """
        order = self._orders.get(slot)
        if order is None:
            order = self._orders[slot] = OrderedDict()
            self._units[slot] = 0
        age = now - next(iter(order.values()), now)
        fresh = self.fresh(slot, chain, len(chain), now - min(_FRESH_SECONDS, age * _FRESH_PART))
        touched = order[chain[fresh - 1]] if fresh else now
        bit, masks, new = 1 << slot, self._masks, 0
        for node in reversed(chain[fresh:]):
            if node in order:
                order.move_to_end(node)
            else:
                masks[node] = masks.get(node, 0) | bit
                new += 4 if node & 1 else 1  # node_units, without its call
            order[node] = touched
        if new:
            self._units[slot] += new
            self._trim(slot)

    def matched(self, chain: Sequence[int], mask: int) -> dict[int, int]:
        """How many leading nodes each engine of `mask` holds (engines with none are left out)."""
        return leading_runs(self._masks, chain, mask)

    def fresh(self, slot: int, chain: Sequence[int], depth: int, since: float) -> int:
        """How many of the first `depth` nodes were sent to the engine at or after `since`."""
        order = self._orders.get(slot)
        if order is None:
            return 0
        while depth and order.get(chain[depth - 1], -1.0) < since:
            depth -= 1
        return depth

    def clear(self, slot: int) -> None:
        """Forget everything about one engine."""
        for node in self._orders.pop(slot, ()):
            self._drop(node, 1 << slot)
        self._units.pop(slot, None)
        self._capacity.pop(slot, None)

    def forget_nodes(self, slot: int) -> None:
        """The engine lost its cache: forget the nodes, keep the capacity."""
        capacity = self._capacity.get(slot)
        self.clear(slot)
        if capacity is not None:
            self._capacity[slot] = capacity

    def _trim(self, slot: int) -> None:
        order = self._orders.get(slot)
        limit = self._capacity.get(slot, self._default)
        while order and self._units[slot] > limit:
            node, _ = order.popitem(last=False)
            self._units[slot] -= node_units(node)
            self._drop(node, 1 << slot)

    def _drop(self, node: int, bit: int) -> None:
        left = self._masks[node] & ~bit
        if left:
            self._masks[node] = left
        else:
            del self._masks[node]

    def check(self) -> None:
        expected: dict[int, int] = {}
        for slot, order in self._orders.items():
            limit = self._capacity.get(slot, self._default)
            units = sum(map(node_units, order))
            assert units == self._units[slot] <= limit, f"slot {slot} holds {units} units of {limit}"
            for node in order:
                expected[node] = expected.get(node, 0) | 1 << slot
        assert expected == self._masks, "the mask index and the per-engine orders differ"
