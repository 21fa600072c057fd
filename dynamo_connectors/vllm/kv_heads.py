"""Reads what a page of vLLM's KV cache holds, so that it can be compressed; whatever cannot be read is refused.

Everywhere else a page is opaque bytes. Here its heads must be found, because each has scales of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from dynamo_kernels.compressed_copy import refuse_large_groups
from dynamo_kernels.compression import Codec, Compression, HeadLayout
from dynamo_kernels.errors import CopyError
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from dynamo_connectors.errors import ConfigError
from dynamo_connectors.head_map import HeadPage
from dynamo_connectors.vllm.compat import names_kv_dimensions

_REMEDY = "start without --kvbm-compression"
#: A page that has all its heads more often than that is not read by ranks that have others: the pieces are too small.
_MOST_TIMES = 8
#: A dimension of a page: its name, and its size.
_Dimension = tuple[str, int]


def check_compressible(specs: Mapping[str, Any], num_groups: int) -> None:
    """Raises `ConfigError` unless every layer keeps plain keys and values of one size, in one KV cache group."""
    if num_groups != 1:
        raise ConfigError(
            f"the KV of this model cannot be compressed: it is in {num_groups} groups, whose layers share their bytes; "
            f"{_REMEDY}"
        )
    for layer, spec in specs.items():
        reason = _reason_against(spec)
        if reason:
            raise ConfigError(f"the KV of this model cannot be compressed: {layer} {reason}; {_REMEDY}")


def _reason_against(spec: Any) -> str:
    if type(spec) not in (FullAttentionSpec, SlidingWindowSpec):
        return f"is a {type(spec).__name__}, whose heads are not known"
    if spec.dtype not in (torch.bfloat16, torch.float16, torch.float32) or int(getattr(spec, "kv_quant_mode", 0)):
        return f"is kept in {spec.dtype} already, and only bfloat16, float16 and float32 can be compressed"
    if getattr(spec, "head_size_v", spec.head_size) != spec.head_size:
        return "has keys and values of different sizes"
    if int(spec.page_size_bytes) != _elements(spec) * int(spec.dtype.itemsize):
        return "has pages with more in them than keys and values"
    if getattr(spec, "num_head_slots", None) not in (None, spec.num_kv_heads):
        return "packs its heads in a way of its own"
    return ""


def _elements(spec: Any) -> int:
    return int(2 * spec.block_size * spec.num_kv_heads * spec.head_size)


def planned_compressed_bytes(spec: Any) -> int:
    """Bytes that a page takes when it is compressed; the scheduler half knows it without having seen one."""
    sizes = (2, int(spec.num_kv_heads), int(spec.block_size * spec.head_size))
    return HeadLayout(spec.dtype, sizes, (0, 1)).compressed_bytes


def read_codec(compression: str, layers: Sequence[tuple[str, Any, torch.Tensor]]) -> Codec:
    """How the pages of `layers` (name, spec, tensor with the block first) are compressed. Raises `ConfigError`."""
    try:
        codec = Codec(Compression(compression), tuple(read_heads(*layer) for layer in layers))
        refuse_large_groups(codec)
        return codec
    except CopyError as error:
        raise ConfigError(f"the KV of this model cannot be compressed: {error}; {_REMEDY}") from error


def read_heads(layer: str, spec: Any, tensor: torch.Tensor) -> HeadLayout:
    """The dimensions of one layer's pages in memory order. Raises `ConfigError` where there are two ways to read it."""
    found = {_layout(spec, tensor, names) for names in _known_orders(spec) if _fits(spec, tensor, names)}
    if len(found) != 1:
        what = "cannot be read" if not found else "can be read in two ways; another --block-size may tell them apart"
        raise ConfigError(
            f"the KV of this model cannot be compressed: {layer} with pages of {tuple(tensor.shape[1:])} for "
            f"{spec.block_size} tokens and {spec.num_kv_heads} heads of {spec.head_size} {what}; {_REMEDY}"
        )
    return found.pop()


def read_head_page(spec: Any, tensor: torch.Tensor, offset: int) -> tuple[HeadPage, str] | None:
    """Where the heads lie in a layer's page, which begins at `offset` of a row, and what else the page is.

    None where that cannot be told, or they do not lie one behind the other: every token has its own heads then.
    """
    if _reason_against(spec):
        return None
    found = {_in_memory(tensor, names) for names in _known_orders(spec) if _fits(spec, tensor, names)}
    if len(found) != 1:
        return None
    (order,) = found
    at = [name for name, _ in order].index("heads")
    times = math.prod(size for _, size in order[:at])
    if times > _MOST_TIMES:
        return None
    head_bytes = math.prod(size for _, size in order[at + 1 :]) * tensor.element_size()
    what = [item for item in order if item[0] != "heads"], at, replace(spec, num_kv_heads=1)
    return HeadPage(offset, times, spec.num_kv_heads, head_bytes), repr(what)


def _in_memory(tensor: torch.Tensor, names: list[str]) -> tuple[_Dimension, ...]:
    """From the outermost to the innermost. A dimension of one element lies where its stride says."""
    named = zip(names, tensor.shape[1:], tensor.stride()[1:], strict=True)
    return tuple((name, size) for name, size, _ in sorted(named, key=lambda item: (-item[2], -item[1])))


def _known_orders(spec: Any) -> list[list[str]]:
    """Names of a page's dimensions, in the order in which engines' tensors have them.

    `both` is a key and a value of one head; `part` numbers the pieces that a backend cuts its blocks into.
    """
    orders = [["heads", "tokens", "both"], ["kv", "tokens", "heads", "values"], ["kv", "heads", "tokens", "values"]]
    if not names_kv_dimensions():
        orders.append(["tokens", "heads", "both"])
    return [*orders, *(["part", *order] for order in orders)]


def _fits(spec: Any, tensor: torch.Tensor, names: list[str]) -> bool:
    shape = tuple(tensor.shape[1:])
    if tensor.dtype != spec.dtype or len(shape) != len(names):
        return False
    parts = shape[0] if names[0] == "part" else 1
    if spec.block_size % parts:
        return False
    sizes = {
        "part": parts,
        "kv": 2,
        "heads": spec.num_kv_heads,
        "tokens": spec.block_size // parts,
        "values": spec.head_size,
        "both": 2 * spec.head_size,
    }
    return shape == tuple(sizes[name] for name in names)


def _layout(spec: Any, tensor: torch.Tensor, names: list[str]) -> HeadLayout:
    named = zip(names, tensor.shape[1:], tensor.stride()[1:], strict=True)
    # A dimension of one element lies anywhere.
    ordered = sorted((item for item in named if item[1] > 1), key=lambda item: -item[2])
    dimensions = _with_keys_apart([(name, size) for name, size, _ in ordered], tensor.device.type, spec.head_size)
    scaled = tuple(number for number, (name, _) in enumerate(dimensions) if name in ("kv", "heads"))
    return HeadLayout(spec.dtype, tuple(size for _, size in dimensions), scaled)


def _with_keys_apart(dimensions: list[_Dimension], device: str, head_size: int) -> list[_Dimension]:
    """`both` split into keys and values, which differ too much in size to share a scale.

    Kernels for GPUs keep them side by side, token for token. vLLM's kernels for CPUs keep all keys of a head's block
    before all its values. Taken for one another, they would share scales: less precise, but not wrong.
    """
    places = [number for number, (name, _) in enumerate(dimensions) if name == "both"]
    if not places:
        return dimensions
    (last,) = places
    before = dimensions[:last]
    if device == "cpu" and before and before[-1][0] == "tokens":
        return [*before[:-1], ("kv", 2), ("values", before[-1][1] * head_size), *dimensions[last + 1 :]]
    return [*before, ("kv", 2), ("values", head_size), *dimensions[last + 1 :]]
