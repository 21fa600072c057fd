"""SGLang's named host pools, and how they share a worker's disk space.

A plain model has one pool. A hybrid one has more (sliding windows, Mamba states, sparse-attention indexers, draft
models), each with pages of its own shape, and so each with a slab of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamo_connectors.config import GIGABYTE
from dynamo_connectors.errors import ConfigError, StoreError
from dynamo_connectors.sglang.host_pages import HostPool, PageShape, locate_pages
from dynamo_connectors.tiers.base import Buffer
from dynamo_connectors.tiers.nvme import slot_bytes

logger = logging.getLogger(__name__)

#: Of SGLang's named pools, the one whose pages `register_mem_pool_host` hands us.
MAIN_POOL = "kv"
#: The pool whose content differs between tensor-parallel ranks even where the main pool's does not.
_RANK_OWNED = "mamba"


@dataclass(frozen=True)
class NamedPool:
    name: str
    pool: HostPool
    shape: PageShape

    @property
    def host_pages(self) -> int:
        """Pages that SGLang's host memory holds: how much it expects to use this pool, against the others."""
        return max(1, int(getattr(self.pool, "size", 0) or 0) // self.shape.page_tokens)

    def locate(self, num_pages: int, host_indices: Any) -> Sequence[Sequence[Buffer]] | None:
        """Where that many pages lie in memory; None when SGLang's answer does not fit, which is a miss."""
        try:
            return locate_pages(self.pool, host_indices, num_pages, self.shape)
        except StoreError as error:
            logger.error("dynamo: a transfer of the pool %s is refused: %s", self.name, error)
            return None


def pool_name(name: object) -> str:
    """SGLang names pools by an enum of text, or by text."""
    return str(getattr(name, "value", name))


def is_replicated(name: str, facts: Any) -> bool:
    """Whether a pool has the same content on every tensor-parallel rank, and only one of them writes it."""
    return bool(facts.is_mla_model) and facts.tp_size > 1 and name != _RANK_OWNED


def share_space(total_bytes: int, pools: Mapping[str, NamedPool]) -> dict[str, int]:
    """Pages for each pool, in the proportions of SGLang's host memory. Raises `ConfigError` for less than one page."""
    weights = {name: pool.host_pages * slot_bytes(pool.shape.row_bytes) for name, pool in pools.items()}
    whole = sum(weights.values())
    pages: dict[str, int] = {}
    for name, pool in pools.items():
        per_page = slot_bytes(pool.shape.row_bytes)
        pages[name] = total_bytes * weights[name] // whole // per_page
        if pages[name] < 1:
            where = "" if name == MAIN_POOL else f" of the pool {name}"
            raise ConfigError(
                f"--kvbm-nvme-gb leaves {total_bytes / GIGABYTE:g} GB for each worker, less than one page{where} of "
                f"{per_page} bytes; raise it"
            )
    return pages
