"""Reads vLLM's KV cache: its groups, how large a block is, and where the bytes of each block lie."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from dynamo_kernels.block_view import BlockView
from dynamo_kernels.compression import Codec
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec, UniformTypeKVCacheSpecs

from dynamo_connectors.errors import ConfigError, UnsupportedLayoutError
from dynamo_connectors.head_map import HeadPage, Heads
from dynamo_connectors.layout import page_layout
from dynamo_connectors.vllm.groups import Geometry, Group
from dynamo_connectors.vllm.kv_heads import check_compressible, planned_compressed_bytes, read_codec, read_head_page
from dynamo_connectors.vllm.spans import Span, cover, offset_in_row, part_in

#: Exactly these: their subclasses keep, drop or share blocks by rules of their own.
_FULL = (FullAttentionSpec, MLAAttentionSpec)
_REMEDY = "start without --kv-connector dynamo"


@dataclass(frozen=True)
class Pages:
    """The KV cache of one worker, as opaque bytes unless there is a codec: then one part is one layer's page."""

    view: BlockView
    #: Changes when the bytes of a row would be read differently. Addresses and the number of blocks do not matter.
    fingerprint: str
    codec: Codec | None = None
    #: Which part holds a layer's page.
    part_of_layer: Mapping[str, int] = field(default_factory=dict)
    #: Where the heads lie in a row, if a row is nothing but heads.
    heads: Heads | None = None

    @property
    def row_bytes(self) -> int:
        """What a block takes below HBM."""
        return sum(self.view.part_bytes) if self.codec is None else self.codec.row_bytes


def read_geometry(kv_cache_config: Any) -> Geometry:
    """Raises `ConfigError` when this model's KV cannot be tiered; better no server than a silent no-op."""
    groups = kv_cache_config.kv_cache_groups
    if not groups:
        raise ConfigError(f"this model has no KV cache, nothing can be tiered; {_REMEDY}")
    read = tuple(_read_group(group) for group in groups)
    hash_tokens = getattr(kv_cache_config, "hash_block_size", None) or math.gcd(*(group.block_tokens for group in read))
    try:
        return Geometry(read, hash_tokens)
    except ValueError:
        sizes = ", ".join(str(group.block_tokens) for group in read)
        raise ConfigError(
            f"dynamo cannot tier this model: its KV cache groups have blocks of {sizes} tokens, hashed in steps of "
            f"{hash_tokens}; {_REMEDY}"
        ) from None


def _read_group(group: Any) -> Group:
    specs = list(_layer_specs(group).values()) or [group.kv_cache_spec]
    windows = {_window(spec) for spec in specs}
    if len(windows) != 1:
        raise ConfigError(f"dynamo cannot tier this model yet: one KV cache group mixes attention windows; {_REMEDY}")
    return Group(group.kv_cache_spec.block_size, windows.pop())


def _window(spec: Any) -> int | None:
    if type(spec) in _FULL:
        return None
    if type(spec) is SlidingWindowSpec:
        # The engine keeps some tokens more where its drafters may compute the last ones again.
        return int(spec.sliding_window) + int(getattr(spec, "extra_retained_tokens", 0))
    raise ConfigError(
        f"dynamo cannot tier this model yet: part of its KV cache is a {type(spec).__name__}, "
        f"neither full attention nor a sliding window; {_REMEDY}"
    )


def planned_row_bytes(kv_cache_config: Any, compression: str | None = None) -> int:
    """Bytes of one block over all layers of one worker, as vLLM plans them: those of its largest group.

    With `compression`, what they take below HBM. Raises `ConfigError` where that cannot be.
    """
    groups = kv_cache_config.kv_cache_groups
    if compression is None:
        return max(sum(int(spec.page_size_bytes) for spec in _layer_specs(group).values()) for group in groups)
    specs = _layer_specs(groups[0])
    check_compressible(specs, len(groups))
    return sum(planned_compressed_bytes(spec) for spec in specs.values())


def read_pages(kv_caches: Mapping[str, torch.Tensor], kv_cache_config: Any, compression: str | None = None) -> Pages:
    """Raises `UnsupportedLayoutError` when blocks cannot be copied as bytes, `ConfigError` if not compressed."""
    num_blocks = kv_cache_config.num_blocks
    storages: dict[int, torch.UntypedStorage] = {}
    named: list[tuple[str, Span, object]] = []
    for layer, tensor in _layers(kv_caches, kv_cache_config):
        item, storage = tensor.element_size(), tensor.untyped_storage()
        start = tensor.storage_offset() * item
        page = page_layout(layer, tuple(tensor.shape), tensor.stride(), item, start)
        address = storage.data_ptr()
        storages.setdefault(address, storage)
        span = Span(list(storages).index(address), page.stride_bytes, start, start + page.page_bytes)
        named.append((layer, span, page.order))
    rows = cover([span for _, span, _ in named], num_blocks)
    where = [(layer, offset_in_row(rows, span), span.num_bytes, order) for layer, span, order in named]
    groups = [(group.layer_names, repr(group.kv_cache_spec)) for group in kv_cache_config.kv_cache_groups]
    codec = None
    if compression is not None:
        # Layers that share one cache are one part; every other one has its own, also where `cover` would join them.
        layer_of = {span: layer for layer, span, _ in reversed(named)}
        rows = list(dict.fromkeys(span for _, span, _ in named))
        codec = _read_codec(compression, [layer_of[span] for span in rows], kv_caches, kv_cache_config)
    device = next(iter(kv_caches.values())).device
    parts = tuple(_part(list(storages.values())[span.storage], span, num_blocks, device) for span in rows)
    heads = (
        _read_heads(where, kv_caches, kv_cache_config, sum(span.num_bytes for span in rows)) if codec is None else None
    )
    told = (where, groups) if codec is None else (where, groups, codec)
    fingerprint = hashlib.blake2b(repr(told).encode(), digest_size=8).hexdigest()
    part_of_layer = {layer: part_in(rows, span) for layer, span, _ in named}
    pages = Pages(BlockView(parts), fingerprint, codec, part_of_layer, heads)
    planned = planned_row_bytes(kv_cache_config, compression)
    if pages.row_bytes > planned:
        raise UnsupportedLayoutError(
            f"one block takes {pages.row_bytes} bytes in memory, vLLM planned {planned}; "
            f"dynamo cannot tier this layout, {_REMEDY}"
        )
    return pages


def _read_heads(
    where: Sequence[tuple[str, int, int, object]],
    kv_caches: Mapping[str, torch.Tensor],
    kv_cache_config: Any,
    row_bytes: int,
) -> Heads | None:
    if len(kv_cache_config.kv_cache_groups) != 1:
        return None
    (group,) = kv_cache_config.kv_cache_groups
    specs, tensors = _layer_specs(group), dict(_layers(kv_caches, kv_cache_config))
    found: list[HeadPage] = []
    what: list[tuple[str, str]] = []
    for layer, offset, num_bytes, _ in where:
        read = read_head_page(specs[layer], tensors[layer], offset)
        if read is None or read[0].num_bytes != num_bytes:
            return None
        found.append(read[0])
        what.append((layer, read[1]))
    # Layers may share a page, but no part of one.
    return Heads(tuple(found), repr(what)) if sum(page.num_bytes for page in set(found)) == row_bytes else None


def _read_codec(
    compression: str, layers: Sequence[str], kv_caches: Mapping[str, torch.Tensor], kv_cache_config: Any
) -> Codec:
    (group,) = kv_cache_config.kv_cache_groups
    specs, tensors = _layer_specs(group), dict(_layers(kv_caches, kv_cache_config))
    return read_codec(compression, [(layer, specs[layer], tensors[layer]) for layer in layers])


def _layers(kv_caches: Mapping[str, torch.Tensor], kv_cache_config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every layer of every group, its tensor with the block as first dimension."""
    num_blocks = kv_cache_config.num_blocks
    for group in kv_cache_config.kv_cache_groups:
        for layer in group.layer_names:
            tensor = kv_caches[layer]
            if not isinstance(tensor, torch.Tensor) or tensor.shape[0] % num_blocks:
                raise UnsupportedLayoutError(
                    f"layer {layer}: the KV cache is not one tensor with {num_blocks} blocks first; "
                    f"dynamo cannot tier this attention backend, {_REMEDY}"
                )
            # A backend may cut each block into several of its own.
            yield layer, tensor if tensor.shape[0] == num_blocks else tensor.unflatten(0, (num_blocks, -1))


def _part(storage: torch.UntypedStorage, span: Span, num_blocks: int, device: torch.device) -> torch.Tensor:
    # `set_` would quietly grow the storage, and so move the engine's KV cache away from under it.
    if span.stop + (num_blocks - 1) * span.stride > storage.nbytes():
        raise UnsupportedLayoutError(f"the KV cache ends before its last block ({span}); {_REMEDY}")
    raw = torch.empty(0, dtype=torch.uint8, device=device)
    return raw.set_(storage, span.start, (num_blocks, span.num_bytes), (span.stride, 1))


def _layer_specs(group: Any) -> dict[str, Any]:
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return {layer: spec.kv_cache_specs[layer] for layer in group.layer_names}
    return dict.fromkeys(group.layer_names, spec)
