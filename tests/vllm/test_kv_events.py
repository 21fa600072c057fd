"""What is announced must be findable by its tokens, and nothing that left is announced twice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_events import BlockRemoved, BlockStored

from dynamo_connectors.block_manager import Change
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.vllm.kv_events import TierEvents

FIRST, SECOND = BlockKey(b"first-key-12345678"), BlockKey(b"second-key-1234567")


def request(**extra: Any) -> Any:
    plain = {"lora_request": None, "mm_features": [], "prompt_embeds": None, "cache_salt": None, **extra}
    return SimpleNamespace(block_hashes=[FIRST, SECOND], all_token_ids=[1, 2, 3, 4, 5], **plain)


def announced(who: Any) -> list[Any]:
    events = TierEvents(2, enabled=True)
    events.describe(who, 0)
    events.describe(who, 1)
    events.publish([Change("stored", 0, FIRST), Change("stored", 0, SECOND), Change("removed", 0, FIRST)])
    return list(events.take())


def test_blocks_are_announced_with_their_tokens_and_parents() -> None:
    first, second, gone = announced(request())
    assert isinstance(first, BlockStored)
    assert (first.token_ids, first.parent_block_hash, first.medium) == ([1, 2], None, "CPU")
    assert (second.token_ids, second.parent_block_hash) == ([3, 4], first.block_hashes[0])
    assert isinstance(gone, BlockRemoved)
    assert gone.block_hashes == first.block_hashes


@pytest.mark.parametrize("extra", [{"mm_features": [object()]}, {"prompt_embeds": object()}])
def test_blocks_that_their_tokens_do_not_name_are_not_announced(extra: dict[str, Any]) -> None:
    assert announced(request(**extra)) == []
