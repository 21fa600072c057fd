"""Which unused block goes first. Policies order slots; a slot that is read or filled is not in the order at all.

LRU is the default: on production prefix traces it stays within a few points of ARC at every size, and frequency
policies keep dead conversations hot (benchmarks/eviction.py measures both). Every call is O(1).

A block is *used* when a request comes that wants it; being read, and being moved back to the newest end together with
its chain, is not one more use. ARC (Megiddo & Modha, FAST 2003) keeps blocks used once (T1) and more often (T2) in two
orders, remembers the keys it evicted from each (ghosts B1, B2), and lets ghosts that come back shift the share of T1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.config import ARC, LRU
from dynamo_connectors.ghosts import Ghosts


class SlotLists:
    """Doubly linked lists over slots 0 .. capacity - 1, a slot in one of them at most. 16 bytes a slot."""

    def __init__(self, capacity: int, count: int) -> None:
        # Behind the slots, one anchor per list: the anchor's `_newer` is the oldest slot, its `_older` the newest.
        anchors = range(capacity, capacity + count)
        self._capacity = capacity
        self._newer: list[int | None] = [None] * capacity + list(anchors)
        self._older: list[int | None] = [None] * capacity + list(anchors)
        self._anchors = tuple(anchors)

    def __contains__(self, slot: int) -> bool:
        return self._newer[slot] is not None

    def append(self, which: int, slot: int) -> None:
        """Puts `slot`, which is in no list, at the newest end."""
        self.insert_below(self._anchors[which], slot)

    def insert_below(self, other: int, slot: int) -> None:
        """Puts `slot`, which is in no list, where it is the next older one to `other`."""
        older = self._older[other]
        assert older is not None, f"slot {other} is in no list"
        self._older[slot], self._newer[slot] = older, other
        self._newer[older] = self._older[other] = slot

    def remove(self, slot: int) -> None:
        older, newer = self._older[slot], self._newer[slot]
        assert older is not None, f"slot {slot} is in no list"
        assert newer is not None, f"slot {slot} is in no list"
        self._newer[older], self._older[newer] = newer, older
        self._newer[slot] = self._older[slot] = None

    def append_all(self, which: int, slots: Iterable[int]) -> None:
        """`append` of each, one behind the other."""
        newer, older, anchor = self._newer, self._older, self._anchors[which]
        last = older[anchor]
        for slot in slots:
            assert newer[slot] is None, f"slot {slot} is in a list"
            assert last is not None, "the list is broken"
            newer[last], older[slot] = slot, last
            newer[slot] = anchor
            last = slot
        older[anchor] = last

    def renew_all(self, which: int, slots: Iterable[int]) -> None:
        """Moves those of `slots` that are in list `which` to its newest end, one behind the other."""
        newer, older, anchor = self._newer, self._older, self._anchors[which]
        for slot in slots:
            above = newer[slot]
            if above is None or above == anchor:
                continue
            below, last = older[slot], older[anchor]
            assert below is not None, f"slot {slot} is half in a list"
            assert last is not None, "the list is broken"
            newer[below], older[above] = above, below
            newer[last], older[slot] = slot, last
            newer[slot], older[anchor] = anchor, slot

    def remove_all(self, slots: Iterable[int]) -> int:
        """Takes those of `slots` that are in a list out of it; returns how many were."""
        newer, older, removed = self._newer, self._older, 0
        for slot in slots:
            above = newer[slot]
            if above is None:
                continue
            below = older[slot]
            assert below is not None, f"slot {slot} is half in a list"
            newer[below], older[above] = above, below
            newer[slot] = older[slot] = None
            removed += 1
        return removed

    def oldest(self, which: int) -> int | None:
        slot = self._newer[self._anchors[which]]
        return None if slot == self._anchors[which] else slot

    def check(self) -> None:
        """Asserts every invariant. O(capacity)."""
        seen = 0
        for anchor in self._anchors:
            slot, newer = anchor, self._newer[anchor]
            while newer != anchor:
                assert newer is not None, f"the list of anchor {anchor} is broken behind slot {slot}"
                assert self._older[newer] == slot, f"slots {slot} and {newer} disagree about who is older"
                slot, newer = newer, self._newer[newer]
                seen += 1
            assert self._older[anchor] == slot, f"anchor {anchor} does not know its newest slot"
        linked = sum(1 for slot in range(self._capacity) if slot in self)
        assert seen == linked, f"{linked} slots are linked, {seen} can be reached"


class EvictionPolicy(Protocol):
    """An order over the slots that may be evicted. Every call is O(1) a slot.

    `..._all` do for each slot, in the given order, what the call without it does: chains are thousands of blocks long.
    """

    def expect(self, key: BlockKey) -> None:
        """`key` is about to enter: whatever is asked of `victim` until `enter` makes room for it."""

    def enter(self, slot: int) -> None:
        """The expected block has `slot` now; it is not in the order before `add`."""

    def use_all(self, slots: Sequence[int]) -> None:
        """One more request uses these blocks. Those in the order become the last; those outside stay outside."""

    def add(self, slot: int) -> None:
        """The block in `slot` may be evicted from now on, last of all; or it is in the order, and becomes the last."""

    def add_all(self, slots: Sequence[int]) -> None:
        """For slots that are not in the order."""

    def renew_all(self, slots: Sequence[int]) -> None:
        """Those that are in the order become the last, as by `add`."""

    def add_below(self, slot: int, other: int) -> None:
        """Like `add` for a slot that is not in the order, but to be evicted right before `other`, which is."""

    def remove(self, slot: int) -> None:
        """The block in `slot` may no longer be evicted: it is read, or gone. No-op when it is not in the order."""

    def remove_all(self, slots: Sequence[int]) -> None: ...

    def victim(self) -> int | None:
        """The slot to evict next, or None when nothing may go. The order keeps it until `remove`."""

    def evicted(self, slot: int, key: BlockKey) -> None:
        """`slot` was the victim, held `key` and is removed already."""

    def __contains__(self, slot: int) -> bool: ...

    def __len__(self) -> int: ...

    def check(self) -> None: ...


class LruPolicy:
    """Least recently used first."""

    def __init__(self, capacity: int) -> None:
        self._lists = SlotLists(capacity, 1)
        self._size = 0

    def __contains__(self, slot: int) -> bool:
        return slot in self._lists

    def __len__(self) -> int:
        return self._size

    def expect(self, key: BlockKey) -> None:
        """Nothing to learn."""

    def enter(self, slot: int) -> None:
        """Nothing to learn."""

    def use_all(self, slots: Sequence[int]) -> None:
        self._lists.renew_all(0, slots)

    def add(self, slot: int) -> None:
        self.remove(slot)
        self._lists.append(0, slot)
        self._size += 1

    def add_all(self, slots: Sequence[int]) -> None:
        self._lists.append_all(0, slots)
        self._size += len(slots)

    def renew_all(self, slots: Sequence[int]) -> None:
        self._lists.renew_all(0, slots)

    def add_below(self, slot: int, other: int) -> None:
        self._lists.insert_below(other, slot)
        self._size += 1

    def remove(self, slot: int) -> None:
        if slot in self._lists:
            self._lists.remove(slot)
            self._size -= 1

    def remove_all(self, slots: Sequence[int]) -> None:
        self._size -= self._lists.remove_all(slots)

    def victim(self) -> int | None:
        return self._lists.oldest(0)

    def evicted(self, slot: int, key: BlockKey) -> None:
        """Nothing to remember."""

    def check(self) -> None:
        self._lists.check()


_T1, _T2 = 0, 1


class ArcPolicy:
    """Adaptive replacement. As many ghosts as slots."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lists = SlotLists(capacity, 2)
        self._sizes = [0, 0]
        #: Which of T1 and T2 a slot belongs to, also while it is not in the order.
        self._home = bytearray(capacity)
        #: B1 and B2 are its queues `_T1` and `_T2`.
        self._ghosts = Ghosts(capacity)
        #: How many slots T1 may have before it is the one that gives.
        self._target = 0
        #: What the expected block was found to be.
        self._ghost_of: int | None = None
        self._forget_victim = False

    def __contains__(self, slot: int) -> bool:
        return slot in self._lists

    def __len__(self) -> int:
        return self._sizes[_T1] + self._sizes[_T2]

    def expect(self, key: BlockKey) -> None:
        once, often = self._ghosts.sizes
        self._ghost_of, self._forget_victim = self._ghosts.find(key), False
        if self._ghost_of is not None:
            gain = max(1, often // once) if self._ghost_of == _T1 else -max(1, once // often)
            self._target = min(self._capacity, max(0, self._target + gain))
            self._ghosts.remove(key)
        elif self._sizes[_T1] + once >= self._capacity:
            if once:
                self._ghosts.drop_oldest(_T1)
            else:
                # T1 alone fills the cache: blocks that came once and are gone say nothing.
                self._forget_victim = True
        elif often and len(self) + once + often >= 2 * self._capacity:
            self._ghosts.drop_oldest(_T2)

    def enter(self, slot: int) -> None:
        self._home[slot] = _T1 if self._ghost_of is None else _T2
        self._ghost_of, self._forget_victim = None, False

    def use_all(self, slots: Sequence[int]) -> None:
        for slot in slots:
            is_evictable = slot in self
            self.remove(slot)
            self._home[slot] = _T2
            if is_evictable:
                self.add(slot)

    def add(self, slot: int) -> None:
        self.remove(slot)
        self._lists.append(self._home[slot], slot)
        self._sizes[self._home[slot]] += 1

    def add_all(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.add(slot)

    def renew_all(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if slot in self._lists:
                self.add(slot)

    def add_below(self, slot: int, other: int) -> None:
        if self._home[slot] != self._home[other]:
            self.add(slot)
            return
        self._lists.insert_below(other, slot)
        self._sizes[self._home[slot]] += 1

    def remove(self, slot: int) -> None:
        if slot in self._lists:
            self._lists.remove(slot)
            self._sizes[self._home[slot]] -= 1

    def remove_all(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.remove(slot)

    def victim(self) -> int | None:
        recent = self._sizes[_T1]
        gives = recent > self._target or (self._ghost_of == _T2 and recent == self._target)
        first = _T1 if self._forget_victim or gives else _T2
        slot = self._lists.oldest(first)
        return slot if slot is not None else self._lists.oldest(1 - first)

    def evicted(self, slot: int, key: BlockKey) -> None:
        if self._forget_victim:
            return
        home, often = self._home[slot], self._ghosts.sizes[_T2]
        if len(self._ghosts) == self._capacity:
            if home == _T2 and not often:
                return  # the oldest of its queue, and too many
            self._ghosts.drop_oldest(_T2 if often else _T1)
        self._ghosts.add(home, key)

    def check(self) -> None:
        self._lists.check()
        self._ghosts.check()
        assert 0 <= self._target <= self._capacity, f"the share of T1 is {self._target}"


POLICIES: Mapping[str, Callable[[int], EvictionPolicy]] = {LRU: LruPolicy, ARC: ArcPolicy}
