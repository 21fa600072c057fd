"""What the proxy knows without events, the approximate index, and what engines say of themselves."""

from __future__ import annotations

import pytest
from dynamo_proxy.approx_index import ApproxIndex
from dynamo_proxy.dialects import (
    EventSource,
    read_models,
    sglang_capacity_tokens,
    sglang_sources,
    vllm_capacity_tokens,
    vllm_sources,
)
from hypothesis import given
from hypothesis import strategies as st

# --- the approximate index


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True)),
        max_size=30,
    )
)
def test_the_approximate_index_stays_bounded_and_finds_what_it_holds(
    inserts: list[tuple[int, list[int]]],
) -> None:
    index = ApproxIndex(default_capacity_units=8)
    index.set_capacity(1, 3)
    for moment, (slot, numbers) in enumerate(inserts):
        chain = [2 * number for number in numbers[:-1]] + [2 * numbers[-1] + 1]  # the last one is coarse: four units
        index.insert(slot, chain, float(moment))
        index.check()
        capacity = 3 if slot == 1 else 8
        kept = len(chain) if len(chain) + 3 <= capacity else min(len(chain) - 1, capacity)
        if not kept:
            assert index.matched(chain, 1 << slot) == {}
            continue
        assert index.matched(chain, 1 << slot) == {slot: kept}
        assert index.fresh(slot, chain, kept, float(moment)) == kept
        assert index.fresh(slot, chain, kept, moment + 1.0) == 0
    for slot in range(3):
        index.clear(slot)
    assert len(index) == 0


def test_what_was_sent_within_the_last_second_keeps_its_place_among_what_is_forgotten() -> None:
    index = ApproxIndex(default_capacity_units=4)
    for moment, chain in ((0.0, [12]), (8.0, [2, 4]), (8.5, [6]), (8.9, [2, 4]), (8.95, [8, 10])):
        index.insert(0, chain, moment)
        index.check()
    assert (index.matched([2, 4], 1), index.matched([6], 1)) == ({0: 1}, {0: 1})
    index.insert(0, [2, 4], 10.0)  # a second later it counts, and what was forgotten meanwhile is back
    index.check()
    assert (index.matched([2, 4], 1), index.matched([6], 1)) == ({0: 2}, {})


@pytest.mark.parametrize(("step", "others", "capacity"), [(0.5, 80, 1600), (0.01, 20, 600)])
def test_a_prompt_that_grows_within_the_second_is_not_forgotten_from_its_start(
    step: float, others: int, capacity: int
) -> None:
    index, grown, numbers = ApproxIndex(capacity), [2, 4], iter(range(1000, 10**6, 2))
    index.insert(0, grown, 0.0)
    for turn in range(1, 120):
        assert index.matched(grown, 1) == {0: len(grown)}
        grown.append(next(numbers))
        index.insert(0, grown, turn * step)
        for _ in range(others // 4):
            index.insert(0, [next(numbers) for _ in range(4)], turn * step)
        index.check()


# --- dialects


def test_wildcards_become_the_engines_host() -> None:
    answer = {
        "0": {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": "tcp://*:5557",
              "replay_endpoint": "tcp://*:5558", "topic": "kv"},
        "1": {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": "tcp://10.1.1.1:7",
              "replay_endpoint": None},
        "2": {"enable_kv_cache_events": False, "publisher": "null", "endpoint": "tcp://*:9"},
    }  # fmt: skip
    assert vllm_sources(answer, "::1") == (
        EventSource(0, "tcp://[::1]:5557", "tcp://[::1]:5558", "kv"),
        EventSource(1, "tcp://10.1.1.1:7", "", ""),
    )
    info = {
        "kv_events": {
            "publisher": "zmq",
            "endpoint_host": "*",
            "endpoint_port_base": 60,
            "dp_size": 2,
            "topic": "",
        }
    }
    assert sglang_sources(info, "h") == (
        EventSource(0, "tcp://h:60", "", ""),
        EventSource(1, "tcp://h:61", "", ""),
    )
    for nonsense in (None, [], {"kv_events": 3}, {"0": None}, "x"):
        assert vllm_sources(nonsense, "h") == sglang_sources(nonsense, "h") == ()


def test_capacity_and_models_are_read_or_absent() -> None:
    text = 'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0\n'
    assert vllm_capacity_tokens(text) == 1600
    assert vllm_capacity_tokens('vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0\n') is None
    assert sglang_capacity_tokens({"max_total_num_tokens": 5}) == 5
    assert sglang_capacity_tokens({"internal_states": [{"max_total_num_tokens": 6}]}) == 6
    assert sglang_capacity_tokens([]) is None
    models = read_models({"data": [{"id": "base", "parent": None}, {"id": "ad", "parent": "base"}, 5]})
    assert models is not None
    assert (models.ids, models.loras) == ({"base", "ad"}, {"ad"})
    assert read_models([]) is None
