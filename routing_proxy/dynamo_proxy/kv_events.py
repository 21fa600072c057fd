"""KV-cache events of vLLM and SGLang: message bytes to frozen records, and the order of their sequence
numbers.

A batch is an array [timestamp, events, rank]. An event is a map with "type" (vLLM, SGLang 0.5.23) or an array
that starts with its type (SGLang 0.5.12 to 0.5.14, older vLLM). Fields we do not know are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec

from .errors import EventDecodeError

EngineHash = int | bytes
_DECODER = msgspec.msgpack.Decoder()
# Field order of the array dialect, after the tag.
_STORED_FIELDS = (
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
)
_REMOVED_FIELDS = ("block_hashes", "medium")
# Groups whose blocks a prefix hit hangs on. Others (windows, Mamba states) share hashes and come and go alone.
_PREFIX_KINDS = (None, "full_attention", "mla_attention", "sink_full_attention", "unknown")
_NO_GROUP = -1


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Blocks now held in a medium. `token_ids` covers all of them in order; empty when the engine withholds
    it.

    `lora_name` and `cache_salt` name the tree the blocks belong to; `extra` holds, per block, what else went
    into the engine's hash (multi-modal ids), as canonical bytes.
    """

    block_hashes: tuple[EngineHash, ...]
    parent: EngineHash | None
    token_ids: tuple[int, ...]
    block_tokens: int
    medium: str
    lora_name: str
    cache_salt: str
    extra: tuple[bytes, ...]
    group: int
    is_window: bool


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """Blocks no longer held in one medium."""

    block_hashes: tuple[EngineHash, ...]
    medium: str
    group: int


@dataclass(frozen=True, slots=True)
class AllCleared:
    """The engine dropped its whole cache."""


KvEvent = BlocksStored | BlocksRemoved | AllCleared


def decode_batch(payload: bytes) -> tuple[list[KvEvent], int]:
    """Decode one message payload. Returns the events, and how many of an unknown type were passed over.

    Raises EventDecodeError when the batch or a known event is malformed.
    """
    try:
        batch = _DECODER.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EventDecodeError("not_msgpack", f"event payload is not msgpack: {error}") from None
    if not isinstance(batch, list) or len(batch) < 2 or not isinstance(batch[1], list):
        raise EventDecodeError("bad_batch", "event batch is not [timestamp, events, ...]")
    events: list[KvEvent] = []
    unknown = 0
    for raw in batch[1]:
        event = _decode_event(raw)
        if event is None:
            unknown += 1
        else:
            events.append(event)
    return events, unknown


def _decode_event(raw: Any) -> KvEvent | None:
    if isinstance(raw, dict):
        kind, fields = raw.get("type"), raw
    elif isinstance(raw, list) and raw:
        kind = raw[0]
        names = _STORED_FIELDS if kind == "BlockStored" else _REMOVED_FIELDS
        fields = dict(zip(names, raw[1:], strict=False))
    else:
        raise EventDecodeError("bad_event", "an event is neither a map nor a tagged array")
    if kind == "BlockStored":
        return _stored(fields)
    if kind == "BlockRemoved":
        hashes = _hashes(fields.get("block_hashes"))
        return BlocksRemoved(hashes, _medium(fields.get("medium")), _int(fields.get("group_idx"), _NO_GROUP))
    return AllCleared() if kind == "AllBlocksCleared" else None


def _stored(fields: dict[str, Any]) -> BlocksStored:
    hashes = _hashes(fields.get("block_hashes"))
    parent = fields.get("parent_block_hash")
    tokens = fields.get("token_ids") or []
    size = _int(fields.get("block_size"), 0)
    if parent is not None and not isinstance(parent, (int, bytes)):
        raise EventDecodeError("bad_event", "parent_block_hash is neither a number nor bytes")
    if not isinstance(tokens, list) or not all(type(token) is int and abs(token) < 1 << 62 for token in tokens):
        raise EventDecodeError("bad_event", "token_ids is not a list of numbers")
    if size <= 0 or (tokens and len(tokens) != size * len(hashes)):
        raise EventDecodeError("bad_event", f"{len(tokens)} token ids for {len(hashes)} blocks of {size}")
    lora = fields.get("lora_name")
    if not isinstance(lora, str):
        lora = "" if fields.get("lora_id") in (None, -1) else f"lora-{fields['lora_id']}"
    extras, salt = _extra_keys(fields.get("extra_keys"), lora, len(hashes), parent is None)
    salt = fields["cache_salt"] if isinstance(fields.get("cache_salt"), str) else salt
    window = fields.get("kv_cache_spec_sliding_window") is not None
    window = window or fields.get("kv_cache_spec_kind") not in _PREFIX_KINDS
    group = _int(fields.get("group_idx"), _NO_GROUP)
    medium = _medium(fields.get("medium"))
    return BlocksStored(hashes, parent, tuple(tokens), size, medium, lora, salt, extras, group, window)


def _extra_keys(raw: Any, lora: str, count: int, from_root: bool) -> tuple[tuple[bytes, ...], str]:
    """Canonical extra bytes per block, and the cache salt if the first block carries one.

    vLLM lists, untagged, the LoRA name, (multi-modal id, offset) pairs and, in the first block of a prompt,
    the salt.
    """
    if not isinstance(raw, list):
        return (), ""
    salt = ""
    extras = []
    for index, keys in enumerate(raw[:count]):
        kept = []
        for key in keys if isinstance(keys, list) else ():
            if isinstance(key, list) and len(key) == 2 and key[0] == "cache_salt" and isinstance(key[1], str):
                key = key[1]
            if key == lora or (isinstance(key, list) and key[:1] == ["lora"]):
                continue
            if isinstance(key, str) and from_root and index == 0 and not salt:
                salt = key
            else:
                kept.append(key)
        extras.append(msgspec.msgpack.encode(kept) if kept else b"")
    return (tuple(extras) if any(extras) else ()), salt


def _hashes(raw: Any) -> tuple[EngineHash, ...]:
    if not isinstance(raw, list) or not all(isinstance(item, (int, bytes)) for item in raw):
        raise EventDecodeError("bad_event", "block_hashes is not a list of numbers or bytes")
    return tuple(raw)


def _medium(raw: Any) -> str:
    return raw if isinstance(raw, str) else "GPU"


def _int(raw: Any, default: int) -> int:
    return raw if type(raw) is int else default


class Order(Enum):
    """How a sequence number follows the ones before it."""

    NEXT = "next"
    GAP = "gap"
    RESTART = "restart"


class SequenceTracker:
    """The next sequence number expected from one publisher."""

    def __init__(self) -> None:
        self.expected = 0

    def classify(self, sequence: int) -> Order:
        """Backwards means a new life of the publisher: a PUB socket neither repeats nor reorders."""
        if sequence == self.expected:
            return Order.NEXT
        return Order.GAP if sequence > self.expected else Order.RESTART

    def accept(self, sequence: int) -> None:
        self.expected = sequence + 1

    def check(self) -> None:
        assert self.expected >= 0, "negative sequence number expected"
