"""A map of 64-bit numbers in 16 bytes an entry, where a dict takes five times as much.

Hashes only: entries are spread by the low bits of their key over 1,024 pairs of sorted arrays, so that a look is one
bisection in C, and an insertion moves a few kilobytes up to a million entries.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise

_SHARDS = 1024


class CompactMap:
    """key -> value, both below 2**64; a value is never 0, which means that there is none."""

    __slots__ = ("_count", "_shards")

    def __init__(self) -> None:
        self._shards: list[tuple[array[int], array[int]] | None] = [None] * _SHARDS
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def get(self, key: int) -> int:
        shard = self._shards[key & _SHARDS - 1]
        if shard is None:
            return 0
        keys, values = shard
        place = bisect_left(keys, key)
        return values[place] if place < len(keys) and keys[place] == key else 0

    def put(self, key: int, value: int) -> int:
        """Set a value; returns the one before."""
        shard = self._shards[key & _SHARDS - 1]
        if shard is None:
            shard = self._shards[key & _SHARDS - 1] = array("Q"), array("Q")
        keys, values = shard
        place = bisect_left(keys, key)
        if place < len(keys) and keys[place] == key:
            before = values[place]
            values[place] = value
            return before
        keys.insert(place, key)
        values.insert(place, value)
        self._count += 1
        return 0

    def pop(self, key: int) -> int:
        """Forget a key; returns its value."""
        shard = self._shards[key & _SHARDS - 1]
        if shard is None:
            return 0
        keys, values = shard
        place = bisect_left(keys, key)
        if place == len(keys) or keys[place] != key:
            return 0
        del keys[place]
        self._count -= 1
        return values.pop(place)

    def items(self) -> Iterator[tuple[int, int]]:
        for shard in self._shards:
            if shard is not None:
                yield from zip(*shard, strict=True)

    def values(self) -> Iterator[int]:
        for shard in self._shards:
            if shard is not None:
                yield from shard[1]

    def check(self) -> None:
        count = 0
        for number, shard in enumerate(self._shards):
            if shard is None:
                continue
            keys, values = shard
            count += len(keys)
            assert len(keys) == len(values), "keys without values"
            assert all(left < right for left, right in pairwise(keys)), "keys out of order"
            assert all(key & _SHARDS - 1 == number for key in keys), "a key among those of other low bits"
            assert all(values), "an entry that says nothing"
        assert count == self._count, f"{count} entries, {self._count} counted"
