"""The chain that a prompt's pages hang on, from the first one: SGLang tells it with a gap, which is filled here.

The `prefix_keys` of a lookup (SGLang 0.5.14 to 0.5.23) end before the pages of the deepest node that SGLang's own
levels hold, while the pages that it asks about come behind that node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dynamo_connectors.sglang import compat

#: Stands for a chain that nobody can tell. No page hash looks like it.
UNKNOWN = "unknown"

_UNIFIED_CACHE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
#: Since 0.5.23 every lookup gets its prefix here.
_PREFIX = f"{_UNIFIED_CACHE}.get_prefix_hash_values"
_NODE_HASHES = "sglang.srt.mem_cache.unified_cache.unified_tree_core.UnifiedTreeCore.get_hash_values"
#: Before, the scheduler walks the tree itself.
_PREFETCHES = (
    "sglang.srt.mem_cache.hiradix_cache.HiRadixCache.prefetch_from_storage",
    f"{_UNIFIED_CACHE}.prefetch_from_storage",
)

Hook = Callable[..., Any]


def prefix_hooks() -> list[tuple[str, Hook, str]]:
    """What makes `prefix_keys` whole: (target, hook, type). Raises `PluginError`."""
    hooks: list[tuple[str, Hook, str]]
    if hasattr(compat.resolve(_UNIFIED_CACHE), _PREFIX.rsplit(".", 1)[1]):
        compat.resolve(_NODE_HASHES)
        hooks = [(_PREFIX, add_own_hashes, "AFTER")]
    else:
        hooks = [(target, add_last_node, "BEFORE") for target in _PREFETCHES]
    hooks += [(target, mark_gap, "BEFORE") for target in compat.LOOKUPS]
    for target, _, _ in hooks:
        compat.resolve(target)
    return hooks


def add_own_hashes(prefix: list[str], cache: Any, node: Any) -> list[str]:
    return _joined(prefix, cache.tree_core.get_hash_values(node))


def add_last_node(
    cache: Any,
    request: Any,
    node: Any,
    tokens: Any,
    last_hash: str | None = None,
    prefix: list[str] | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before `prefetch_from_storage`."""
    whole = None if prefix is None else _joined(prefix, node.hash_value or [])
    return (cache, request, node, tokens, last_hash, whole), {}


def mark_gap(_controller: object, operation: Any) -> None:
    """Before a lookup: pages that come behind `last_hash` need a prefix that ends with it."""
    prefix = operation.prefix_keys
    if prefix is not None and operation.last_hash is not None and prefix[-1:] != [operation.last_hash]:
        operation.prefix_keys = [UNKNOWN]


def is_whole(prefix_keys: Sequence[str] | None) -> bool:
    return not prefix_keys or prefix_keys[0] != UNKNOWN


def _joined(prefix: list[str], own: Sequence[str]) -> list[str]:
    """An SGLang that leaves no gap needs no filling."""
    return prefix if prefix[-len(own) :] == list(own) else [*prefix, *own]
