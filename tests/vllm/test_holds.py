"""Holds on vLLM's real block pool: what is copied cannot be handed out, and nothing is lost or freed twice."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

from dynamo_connectors.vllm.compat import HbmHolds

BLOCKS = 6


def pool_with_three_cached_blocks(enable_caching: bool = True) -> tuple[BlockPool, list[int]]:
    pool = BlockPool(BLOCKS, enable_caching, 16)
    taken = pool.get_new_blocks(3)
    for block in taken if enable_caching else []:
        key = make_block_hash_with_group_id(BlockHash(bytes([block.block_id]) * 32), 0)
        pool._insert_block_hash(key, block, num_tokens=16)
    return pool, [block.block_id for block in taken]


@pytest.mark.parametrize("enable_caching", [True, False])
def test_a_held_block_outlives_its_request_and_comes_back_once(enable_caching: bool) -> None:
    pool, held = pool_with_three_cached_blocks(enable_caching)
    holds = HbmHolds(pool)
    holds.hold(held)
    pool.free_blocks([pool.blocks[block] for block in reversed(held)])
    others = pool.get_new_blocks(pool.get_num_free_blocks())
    assert not {block.block_id for block in others} & set(held)
    with pytest.raises(ValueError, match="free blocks"):
        pool.get_new_blocks(1)
    assert not pool.reset_prefix_cache()
    pool.free_blocks(others)
    holds.release(held)
    assert (holds.held_blocks, pool.get_num_free_blocks()) == (0, BLOCKS - 1)
    assert pool.reset_prefix_cache()


def test_the_tail_of_a_released_chain_is_evicted_before_its_head() -> None:
    pool, held = pool_with_three_cached_blocks()
    holds = HbmHolds(pool)
    holds.hold(held)
    pool.free_blocks([pool.blocks[block] for block in reversed(held)])
    holds.release(held)
    order = [block.block_id for block in pool.get_new_blocks(BLOCKS - 1)]
    assert order[-3:] == held[::-1]
