"""What is announced must be findable by its tokens, and nothing that left is announced twice."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_events import BlockRemoved, BlockStored

from dynamo_connectors.block_manager import Change
from dynamo_connectors.vllm.groups import Chains, Geometry, Group
from dynamo_connectors.vllm.kv_events import TierEvents
from tests.vllm.requests import BLOCK, real_request

ONE = Geometry((Group(BLOCK),), BLOCK)


def announced(who: Any, geometry: Geometry = ONE, tier: str = "host_dram", group: int = 0) -> list[Any]:
    events = TierEvents(geometry, enabled=True)
    keys = Chains(geometry, who.block_hashes).keys(group)
    events.describe(who, group, 0, keys[:1])
    events.describe(who, group, 1, keys[1:2])
    stored = [Change("stored", tier, key) for key in keys[:2]]
    events.publish([*stored, stored[0], Change("removed", tier, keys[0]), Change("removed", tier, keys[0])])
    return list(events.take())


@pytest.mark.parametrize(
    ("tier", "medium"), [("host_dram", "CPU"), ("nvme_ssd", "STORAGE"), ("object_store", "EXTERNAL")]
)
def test_blocks_are_announced_with_tokens_parent_and_medium(tier: str, medium: str) -> None:
    first, second, gone = announced(real_request(), tier=tier)
    assert isinstance(first, BlockStored)
    assert (first.token_ids, first.parent_block_hash, first.medium) == ([0, 1, 2, 3], None, medium)
    assert (second.token_ids, second.parent_block_hash) == ([4, 5, 6, 7], first.block_hashes[0])
    assert isinstance(gone, BlockRemoved)
    assert (gone.block_hashes, gone.medium) == (first.block_hashes, medium)


def test_media_adapters_and_salts_are_named_as_the_engine_names_them() -> None:
    first, second, _ = announced(real_request(image="cat", lora="style", cache_salt="mine"))
    assert first.extra_keys == [("style", "mine")]
    assert second.extra_keys == [("style", ("cat", 0))]
    assert first.lora_name == second.lora_name == "style"


def test_blocks_of_a_window_say_so() -> None:
    geometry = Geometry((Group(BLOCK), Group(BLOCK, 6)), BLOCK)
    full, _, _ = announced(real_request(), geometry)
    window, _, gone = announced(real_request(), geometry, group=1)
    assert full.block_hashes == window.block_hashes
    assert (full.group_idx, full.kv_cache_spec_sliding_window) == (0, None)
    assert (window.group_idx, window.kv_cache_spec_sliding_window, gone.group_idx) == (1, 6, 1)


def test_without_listeners_nothing_is_kept() -> None:
    events = TierEvents(ONE, enabled=False)
    who = real_request()
    events.describe(who, 0, 0, who.block_hashes[:1])  # type: ignore[arg-type]
    events.publish([Change("stored", "host_dram", who.block_hashes[0])])  # type: ignore[arg-type]
    assert not list(events.take())


def test_whatever_changes_the_kv_changes_every_key_behind_it() -> None:
    """Real hashes: what the tiers are keyed by must tell apart what the engine computes differently."""
    plain = real_request().block_hashes
    for other in (
        real_request(cache_salt="a"),
        real_request(cache_salt="b"),
        real_request(lora="style"),
        real_request(lora="tone"),
        real_request(image="cat"),
        real_request(image="dog"),
    ):
        start = 1 if other.mm_features else 0
        assert not set(plain[start:]) & set(other.block_hashes[start:])
    chains = [real_request(**extra).block_hashes for extra in ({"lora": "style"}, {"lora": "tone"})]
    assert not set(chains[0]) & set(chains[1])
