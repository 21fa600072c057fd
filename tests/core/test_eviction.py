"""The order of eviction, against a list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.eviction import LruPolicy

KEYS = [BlockKey(bytes([number])) for number in range(5)]
calls = st.lists(st.tuples(st.sampled_from(["add", "remove"]), st.sampled_from(KEYS)), max_size=40)


@given(calls=calls)
def test_lru_agrees_with_a_list(calls: list[tuple[str, BlockKey]]) -> None:
    policy, order = LruPolicy(), list[BlockKey]()
    for name, key in calls:
        getattr(policy, name)(key)
        order = [other for other in order if other != key] + ([key] if name == "add" else [])
        assert policy.victim() == (order[0] if order else None)
        assert policy.victim() == (order[0] if order else None), "asking changed the order"
        assert len(policy) == len(order)
        assert [key in policy for key in KEYS] == [key in order for key in KEYS]
