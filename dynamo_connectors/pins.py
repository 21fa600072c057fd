"""Pins with an end: blocks that must not be evicted before a given time. Pure; the time is an argument.

They may hold half of a tier at most, so that a flood of them cannot stop the cache from taking new blocks.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.tier_stack import NamedTier, TierStack

#: Tier and entry of its index.
Entry = tuple[str, BlockKey]


@dataclass
class _Pin:
    until: float
    #: None: the block is on its way into the first tier; the pin begins when it is there.
    slot: int | None


class TimedPins:
    def __init__(self, stack: TierStack) -> None:
        self._stack = stack
        self._pins: dict[Entry, _Pin] = {}
        self._held: Counter[str] = Counter()
        #: (when to look, tie-breaker, pins): every pin is in one record, at its end or before it.
        self._due: list[tuple[float, int, list[Entry]]] = []
        self._records = count()

    def pin(self, chain: Sequence[BlockKey], until: float) -> int:
        """Keeps the leading run of `chain`, given from its first block on, where it lies; returns its length.

        A block on its way into the first tier counts as there. Pins that exist get the later end.
        """
        taken: list[Entry] = []
        run = 0
        for position, key in enumerate(chain):
            found = self._stack.find(chain, position)
            if found is not None:
                tier, name = found[0], found[1].name
            elif self._stack.first.index.is_known(key):
                tier, name = self._stack.first, key
            else:
                break
            entry = (tier.name, name)
            pin = self._pins.get(entry)
            if pin is not None:
                pin.until = max(pin.until, until)
            elif self._held[tier.name] >= tier.index.capacity_blocks // 2:
                self._stack.dropped["pin_refused"] += len(chain) - run
                break
            else:
                self._pins[entry] = _Pin(until, tier.index.pin(name))
                self._held[tier.name] += 1
                taken.append(entry)
            run += 1
        self._look_at(until, taken)
        return run

    def expire(self, now: float) -> int:
        """Ends the pins whose time has come; returns how many entries are free to go now."""
        ended = 0
        while self._due and self._due[0][0] <= now:
            _, _, entries = heapq.heappop(self._due)
            later: dict[float, list[Entry]] = {}
            for entry in reversed(entries):  # the head of a chain becomes the newest
                pin = self._pins.get(entry)
                if pin is None:
                    continue
                if pin.until > now:
                    later.setdefault(pin.until, []).append(entry)
                else:
                    self._end(entry)
                    ended += 1
            for until, renewed in later.items():
                self._look_at(until, renewed[::-1])
        return ended

    def arrived(self, key: BlockKey) -> None:
        """`key` can be read from the first tier now: a pin that waited for it begins."""
        if not self._pins:
            return
        first = self._stack.first
        pin = self._pins.get((first.name, key))
        if pin is not None and pin.slot is None:
            pin.slot = first.index.pin(key)

    def drop(self, tier: NamedTier, name: BlockKey) -> None:
        """The content of the entry is gone, or never came."""
        if (tier.name, name) in self._pins:
            self._end((tier.name, name))

    def drop_all(self) -> None:
        for entry in list(self._pins):
            self._end(entry)

    def slots(self) -> Counter[tuple[str, int]]:
        """(tier, slot) -> pins held."""
        return Counter((tier, pin.slot) for (tier, _), pin in self._pins.items() if pin.slot is not None)

    def check(self) -> None:
        """Asserts every invariant. O(pins)."""
        assert +self._held == Counter(tier for tier, _ in self._pins), "timed pins are miscounted"
        watched = Counter(entry for _, _, entries in self._due for entry in entries)
        for (tier, name), pin in self._pins.items():
            assert watched[tier, name], f"{tier}: a timed pin would never end"
            index = self._stack.by_name[tier].index
            assert pin.slot == index.slot_of(name), f"{tier}: a timed pin holds slot {pin.slot}, not its block's"
            assert pin.slot is not None or index.is_known(name), f"{tier}: a timed pin waits for what will not come"
        for tier, held in self._held.items():
            assert held <= self._stack.by_name[tier].index.capacity_blocks // 2, f"{tier}: too many timed pins"

    def _look_at(self, when: float, entries: Iterable[Entry]) -> None:
        together = list(entries)
        if together:
            heapq.heappush(self._due, (when, next(self._records), together))

    def _end(self, entry: Entry) -> None:
        pin = self._pins.pop(entry)
        self._held[entry[0]] -= 1
        if pin.slot is not None:
            self._stack.by_name[entry[0]].index.unpin(pin.slot)
