"""Tells routers which blocks live below HBM, in vLLM's own event format."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from cachetools import LRUCache
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, maybe_convert_block_hash

from dynamo_connectors.block_manager import Change
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.config import HOST_DRAM, NVME_SSD, OBJECT_STORE
from dynamo_connectors.vllm.groups import Geometry, group_of

#: Where a block lies, in the words of engines' events. Each tier needs its own: removals name nothing else.
MEDIA = {HOST_DRAM: "CPU", NVME_SSD: "STORAGE", OBJECT_STORE: "EXTERNAL"}
#: Descriptions kept for blocks that are on their way down. A block without one is not announced.
_MAX_DESCRIBED = 16384
#: Engines before 0.32 hash the keys as they announce them.
_event_keys = getattr(kv_cache_utils, "to_event_extra_keys", list)


class Described(NamedTuple):
    block_hash: bytes
    parent: bytes | None
    token_ids: list[int]
    lora_name: str | None
    extra_keys: Any


class TierEvents:
    """Collects events until vLLM takes them. `enabled` is False when the user did not ask for KV events."""

    def __init__(self, geometry: Geometry, enabled: bool) -> None:
        self._geometry = geometry
        self._enabled = enabled
        self._described: LRUCache[BlockKey, Described] = LRUCache(_MAX_DESCRIBED)
        #: Tier -> block -> the hash it was announced by.
        self._announced: defaultdict[str, dict[BlockKey, bytes]] = defaultdict(dict)
        self._events: list[KVCacheEvent] = []

    def describe(self, request: Any, group: int, first: int, keys: Sequence[BlockKey]) -> None:
        """Remembers what the blocks from `first` on of `request` in `group` contain, for when they arrive in a tier.

        Media, LoRA adapters, cache salts and prompt embeddings are named in the block's extra keys, as the engine
        names them for its own blocks.
        """
        if self._enabled:
            for index, key in enumerate(keys, first):
                self._described[key] = self._description(request, group, index)

    def _description(self, request: Any, group: int, index: int) -> Described:
        size = self._geometry.groups[group].block_tokens
        start = index * size
        extra, _ = generate_block_hash_extra_keys(request, start, start + size, 0)
        first, last = start // self._geometry.hash_tokens, (start + size) // self._geometry.hash_tokens - 1
        return Described(
            block_hash=request.block_hashes[last],
            parent=request.block_hashes[first - 1] if start else None,
            token_ids=list(request.all_token_ids[start : start + size]),
            lora_name=request.lora_request.lora_name if request.lora_request else None,
            extra_keys=_event_keys([extra]),
        )

    def publish(self, changes: Sequence[Change]) -> None:
        if not self._enabled:
            return
        for change in changes:
            announced = self._announced[change.tier]
            if change.kind == "removed" and change.key in announced:
                self._events.append(self._removed(change, announced.pop(change.key)))
            elif change.kind == "stored" and change.key not in announced:
                described = self._described.get(change.key)
                if described is not None:
                    announced[change.key] = described.block_hash
                    self._events.append(self._stored(change, described))

    def take(self) -> Iterable[KVCacheEvent]:
        events, self._events = self._events, []
        return events

    def check(self) -> None:
        assert self._enabled or not (self._events or self._described), "events were collected that nobody asked for"

    def _stored(self, change: Change, described: Described) -> KVCacheEvent:
        group = group_of(change.key, len(self._geometry.groups))
        return BlockStored(
            block_hashes=[maybe_convert_block_hash(described.block_hash)],
            parent_block_hash=maybe_convert_block_hash(described.parent) if described.parent else None,
            token_ids=described.token_ids,
            block_size=self._geometry.groups[group].block_tokens,
            lora_id=None,
            medium=MEDIA[change.tier],
            lora_name=described.lora_name,
            extra_keys=described.extra_keys,
            group_idx=group,
            kv_cache_spec_sliding_window=self._geometry.groups[group].window_tokens,
        )

    def _removed(self, change: Change, block_hash: bytes) -> KVCacheEvent:
        return BlockRemoved(
            block_hashes=[maybe_convert_block_hash(block_hash)],
            medium=MEDIA[change.tier],
            group_idx=group_of(change.key, len(self._geometry.groups)),
        )
