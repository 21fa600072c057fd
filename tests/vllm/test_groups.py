"""The longest usable prefix over several KV cache groups: against brute force, and against vLLM's own coordinator."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_connectors.vllm.groups import Chains, Geometry, Group, group_key, group_of

pytest.importorskip("vllm")

import torch
from vllm.v1.core.kv_cache_coordinator import get_kv_cache_coordinator
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

BLOCKS = 24


def readable_in(present: list[set[int]]):  # type: ignore[no-untyped-def]
    def readable(group: int, start: int, stop: int) -> int:
        run = 0
        while start + run < stop and start + run in present[group]:
            run += 1
        return run

    return readable


def brute_force(geometry: Geometry, local: int, limit: int, present: list[set[int]]) -> int:
    for total in range(limit, local, -1):
        if total % geometry.unit_tokens:
            continue
        needed = [(index, block) for index, group in enumerate(geometry.groups) for block in group.needed(local, total)]
        if all(block in present[index] for index, block in needed):
            return total
    return local


SIZES = st.sampled_from([2, 4])
WINDOWS = st.one_of(st.none(), st.integers(1, 30))
MOSTLY = st.sets(st.integers(0, BLOCKS - 1), max_size=4).map(lambda gone: set(range(BLOCKS)) - gone)


@given(st.lists(st.tuples(st.builds(Group, SIZES, WINDOWS), MOSTLY), min_size=1, max_size=3), st.data())
@settings(max_examples=400, deadline=None)
def test_the_longest_prefix_is_the_one_brute_force_finds(
    groups: list[tuple[Group, set[int]]], data: st.DataObject
) -> None:
    geometry = Geometry(tuple(group for group, _ in groups), 2)
    present = [blocks for _, blocks in groups]
    unit = geometry.unit_tokens
    limit = data.draw(st.integers(0, BLOCKS * 2 // unit)) * unit
    local = data.draw(st.integers(0, limit // unit)) * unit
    found = geometry.longest_prefix(local, limit, readable_in(present))
    assert found == brute_force(geometry, local, limit, present)


@given(MOSTLY, MOSTLY, st.integers(2, 40), st.integers(1, BLOCKS * 2))
@settings(max_examples=200, deadline=None)
def test_it_is_the_prefix_that_vllm_would_use(full: set[int], window: set[int], reach: int, limit: int) -> None:
    """vLLM's coordinator over its own block pool, told that the same blocks are cached."""
    block = 2
    shape = {"block_size": block, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    specs = [FullAttentionSpec(**shape), SlidingWindowSpec(**shape, sliding_window=reach)]
    groups = [KVCacheGroupSpec([f"layer{index}"], spec) for index, spec in enumerate(specs)]
    coordinator = get_kv_cache_coordinator(
        KVCacheConfig(3 * BLOCKS, [], groups), 1024, 1024, False, True, False, 1, 1, block, block
    )
    hashes = [BlockHash(bytes([index]) * 32) for index in range(BLOCKS)]
    pool = coordinator.block_pool
    for group, present in enumerate((full, window)):
        for index, taken in zip(sorted(present), pool.get_new_blocks(len(present)), strict=True):
            pool._insert_block_hash(make_block_hash_with_group_id(hashes[index], group), taken, num_tokens=block)
    _, theirs, _ = coordinator.find_longest_cache_hit(hashes, limit)
    geometry = Geometry((Group(block), Group(block, reach)), block)
    assert geometry.longest_prefix(0, limit, readable_in([full, window])) == theirs


def test_a_window_leaves_the_last_token_of_a_prompt_to_the_engine() -> None:
    assert Geometry((Group(4),), 4).longest_limit(16, 4) == 16
    assert Geometry((Group(4), Group(4, 8)), 4).longest_limit(16, 4) == 12
    assert Geometry((Group(4), Group(8)), 4).longest_limit(31, 7) == 24


def test_blocks_of_two_groups_never_share_a_name_and_grow_with_the_hashes() -> None:
    hashes = [b"h0", b"h1", b"h2"]
    chains = Chains(Geometry((Group(4), Group(8, 16)), 4), hashes)
    assert list(chains.keys(1)) == [b"h1/1"]
    hashes.append(b"h3")
    assert list(chains.keys(1)) == [b"h1/1", b"h3/1"]
    assert not set(chains.keys(0)) & set(chains.keys(1))
    assert {group_of(key, 2) for key in chains.keys(0)} == {0}
    assert Chains(Geometry((Group(4),), 4), hashes).keys(0) is hashes


def test_hashes_that_are_longer_than_a_block_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be named"):
        Geometry((Group(4), Group(6, 8)), 4)


def test_a_hash_that_the_engine_took_back_names_no_block_any_more() -> None:
    """vLLM gives up the last token of a session that goes on; the block it ended gets another hash, and other bytes."""
    hashes = [b"a", b"b", b"c"]
    chains = Chains(Geometry((Group(16), Group(32)), 16), hashes)
    before = [list(chains.keys(0)), list(chains.keys(1))]
    hashes[1:] = [b"d"]
    assert list(chains.keys(0)) == [before[0][0], group_key(b"d", 0)]
    assert list(chains.keys(1)) == [group_key(b"d", 1)] != before[1]
    hashes[:] = []
    assert not chains.keys(0)
    hashes += [b"e", b"f", b"g", b"h"]
    assert [len(chains.keys(0)), len(chains.keys(1))] == [4, 2]
