"""What ARC remembers of evicted blocks: two queues of key digests in flat arrays, 33 bytes a ghost at most. Pure.

A digest is 64 bits of a key. Two keys that share one are taken for each other, once in 10 million years of evictions,
and the price is one wrong guess about what to evict.
"""

from __future__ import annotations

from array import array

from dynamo_connectors.blocks import BlockKey

#: The queue of those that are none.
_FREE = 2


class Ghosts:
    """At most `capacity` ghosts in the queues 0 and 1. Every call is O(1)."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._digests = array("q", bytes(8 * capacity))
        #: Per ghost its neighbours in its queue. Behind the ghosts an anchor for each queue, and one for the free ones,
        #: which form a queue as well.
        self._newer = array("I", range(1, capacity + 4))
        self._older = array("I", [0]) + array("I", range(capacity + 2))
        self._queue = bytearray([_FREE]) * capacity
        for queue in (0, 1):
            self._newer[capacity + queue] = self._older[capacity + queue] = capacity + queue
        free = capacity + _FREE
        self._newer[free], self._older[free] = (0, capacity - 1) if capacity else (free, free)
        if capacity:
            self._older[0] = self._newer[capacity - 1] = free
        #: Open addressing at most half full: number of a ghost plus one, 0 for none.
        self._mask = (1 << (2 * max(1, capacity) - 1).bit_length()) - 1
        self._table = array("I", bytes(4 * (self._mask + 1)))
        self.sizes = [0, 0]

    def __len__(self) -> int:
        return self.sizes[0] + self.sizes[1]

    def find(self, key: BlockKey) -> int | None:
        """The queue that `key` is in, else None."""
        place = self._find(hash(key))
        return None if place is None else self._queue[self._table[place] - 1]

    def remove(self, key: BlockKey) -> None:
        """No-op when it is not there."""
        place = self._find(hash(key))
        if place is not None:
            self._remove(place)

    def add(self, queue: int, key: BlockKey) -> None:
        """As the newest of `queue`. There is room."""
        ghost = self._newer[self._capacity + _FREE]
        assert ghost < self._capacity, "more ghosts than slots"
        self._digests[ghost] = digest = hash(key)
        place = digest & self._mask
        while self._table[place]:
            place = (place + 1) & self._mask
        self._table[place] = ghost + 1
        self._move(ghost, queue)
        self.sizes[queue] += 1

    def drop_oldest(self, queue: int) -> None:
        """There is one."""
        ghost = self._newer[self._capacity + queue]
        assert ghost < self._capacity, f"queue {queue} is empty"
        place = self._digests[ghost] & self._mask
        while self._table[place] != ghost + 1:
            place = (place + 1) & self._mask
        self._remove(place)

    def check(self) -> None:
        """Asserts every invariant. O(capacity)."""
        for queue in (0, 1, _FREE):
            anchor = at = self._capacity + queue
            count = 0
            while (newer := self._newer[at]) != anchor:
                assert self._older[newer] == at, f"ghosts {at} and {newer} disagree about who is older"
                assert self._queue[newer] == queue, f"ghost {newer} is in a queue that it does not know"
                at, count = newer, count + 1
            assert self._older[anchor] == at, f"queue {queue} does not know its newest ghost"
            wanted = self._capacity - len(self) if queue == _FREE else self.sizes[queue]
            assert count == wanted, f"queue {queue} has {count} ghosts, not {wanted}"
        listed = [entry - 1 for entry in self._table if entry]
        assert len(set(listed)) == len(listed) == len(self), "the table and the queues have other ghosts"
        for ghost in listed:
            place = self._digests[ghost] & self._mask
            while self._table[place] != ghost + 1:
                assert self._table[place], f"ghost {ghost} cannot be found"
                place = (place + 1) & self._mask

    def _find(self, digest: int) -> int | None:
        place = digest & self._mask
        while entry := self._table[place]:
            if self._digests[entry - 1] == digest:
                return place
            place = (place + 1) & self._mask
        return None

    def _remove(self, place: int) -> None:
        ghost = self._table[place] - 1
        self.sizes[self._queue[ghost]] -= 1
        self._move(ghost, _FREE)
        # What stands behind the gap moves up, unless it would pass the place where its search begins.
        at = place
        while True:
            at = (at + 1) & self._mask
            entry = self._table[at]
            if not entry:
                break
            start = self._digests[entry - 1] & self._mask
            if (at - start) & self._mask >= (at - place) & self._mask:
                self._table[place] = entry
                place = at
        self._table[place] = 0

    def _move(self, ghost: int, queue: int) -> None:
        """To the newest end of another queue."""
        older, newer = self._older[ghost], self._newer[ghost]
        self._newer[older], self._older[newer] = newer, older
        anchor = self._capacity + queue
        older = self._older[anchor]
        self._older[ghost], self._newer[ghost] = older, anchor
        self._newer[older] = self._older[anchor] = ghost
        self._queue[ghost] = queue
