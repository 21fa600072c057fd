"""Tells routers which blocks live below HBM, in vLLM's own event format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from cachetools import LRUCache
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from dynamo_connectors.block_manager import Change
from dynamo_connectors.blocks import BlockKey

#: vLLM's names for where a block lies, by position of the tier below HBM.
MEDIA = ("CPU", "STORAGE")
#: Descriptions kept for blocks that are on their way down. A block without one is not announced.
_MAX_DESCRIBED = 16384


class Described(NamedTuple):
    parent: BlockKey | None
    token_ids: list[int]
    lora_name: str | None
    cache_salt: str | None


class TierEvents:
    """Collects events until vLLM takes them. `enabled` is False when the user did not ask for KV events."""

    def __init__(self, block_size_tokens: int, enabled: bool) -> None:
        self._block_size = block_size_tokens
        self._enabled = enabled
        self._described: LRUCache[BlockKey, Described] = LRUCache(_MAX_DESCRIBED)
        self._announced: tuple[set[BlockKey], ...] = tuple(set() for _ in MEDIA)
        self._events: list[KVCacheEvent] = []

    def describe(self, request: Any, index: int) -> None:
        """Remembers what block `index` of `request` contains, for when it arrives in a tier."""
        if not self._enabled or getattr(request, "mm_features", None):
            return
        if getattr(request, "prompt_embeds", None) is not None:  # its token ids are placeholders
            return
        lora = request.lora_request.lora_name if request.lora_request else None
        start = index * self._block_size
        self._described[request.block_hashes[index]] = Described(
            parent=request.block_hashes[index - 1] if index else None,
            token_ids=list(request.all_token_ids[start : start + self._block_size]),
            lora_name=lora,
            cache_salt=getattr(request, "cache_salt", None) if index == 0 else None,
        )

    def publish(self, changes: Sequence[Change]) -> None:
        if not self._enabled:
            return
        for change in changes:
            announced = self._announced[change.tier]
            if change.kind == "removed" and change.key in announced:
                announced.remove(change.key)
                self._events.append(_removed(change))
            elif change.kind == "stored":
                described = self._described.get(change.key)
                if described is not None:
                    announced.add(change.key)
                    self._events.append(self._stored(change, described))

    def take(self) -> Iterable[KVCacheEvent]:
        events, self._events = self._events, []
        return events

    def check(self) -> None:
        assert self._enabled or not (self._events or self._described), "events were collected that nobody asked for"

    def _stored(self, change: Change, described: Described) -> KVCacheEvent:
        extra = (described.lora_name, described.cache_salt)
        keys = tuple(key for key in extra if key is not None)
        return BlockStored(
            block_hashes=[maybe_convert_block_hash(change.key)],
            parent_block_hash=maybe_convert_block_hash(described.parent) if described.parent else None,
            token_ids=described.token_ids,
            block_size=self._block_size,
            lora_id=None,
            medium=MEDIA[change.tier],
            lora_name=described.lora_name,
            extra_keys=[keys or None],
        )


def _removed(change: Change) -> KVCacheEvent:
    return BlockRemoved(block_hashes=[maybe_convert_block_hash(change.key)], medium=MEDIA[change.tier])
