"""The ghosts of ARC against two ordered dicts, with digests that collide in the table."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.ghosts import Ghosts

calls = st.lists(st.tuples(st.sampled_from(["add", "remove", "drop"]), st.integers(0, 1), st.integers(0, 12)))


class Key(bytes):
    """Of equal keys only; many share a place in the table, at its end too."""

    def __hash__(self) -> int:
        return self[0] * 7 - 30


def key_of(number: int) -> BlockKey:
    return BlockKey(Key([number]))


@given(capacity=st.integers(1, 6), calls=calls)
def test_ghosts_agree_with_ordered_dicts(capacity: int, calls: list[tuple[str, int, int]]) -> None:
    ghosts, queues = Ghosts(capacity), (OrderedDict[int, None](), OrderedDict[int, None]())
    for name, queue, number in calls:
        is_there = number in queues[0] or number in queues[1]
        if name == "add" and not is_there and sum(map(len, queues)) < capacity:
            ghosts.add(queue, key_of(number))
            queues[queue][number] = None
        elif name == "remove":
            ghosts.remove(key_of(number))
            for each in queues:
                each.pop(number, None)
        elif name == "drop" and queues[queue]:
            ghosts.drop_oldest(queue)
            queues[queue].popitem(last=False)
        ghosts.check()
        assert ghosts.sizes == [len(each) for each in queues]
        for number in range(13):
            where = next((which for which in (0, 1) if number in queues[which]), None)
            assert ghosts.find(key_of(number)) == where


def test_more_ghosts_than_there_is_room_for_are_a_bug() -> None:
    ghosts = Ghosts(1)
    ghosts.add(0, key_of(1))
    with pytest.raises(AssertionError, match="more ghosts"):
        ghosts.add(1, key_of(2))
    with pytest.raises(AssertionError, match="empty"):
        ghosts.drop_oldest(1)
