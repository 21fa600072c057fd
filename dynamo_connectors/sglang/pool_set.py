"""The pools of one worker, each with the pages it keeps: opened together, because they share its disk space."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dynamo_connectors.blocks import BlockKey, Namespace
from dynamo_connectors.config import GIGABYTE, NVME_SSD, KvbmConfig
from dynamo_connectors.errors import ConfigError, UnsupportedLayoutError
from dynamo_connectors.sglang import page_io
from dynamo_connectors.sglang.host_pages import layout_fingerprint
from dynamo_connectors.sglang.object_tier import ObjectTier
from dynamo_connectors.sglang.page_io import Page
from dynamo_connectors.sglang.page_store import PageCounts, PageStore, Watcher
from dynamo_connectors.sglang.pools import MAIN_POOL, NamedPool, is_replicated, share_space
from dynamo_connectors.sglang.shared_pages import SharedPages
from dynamo_connectors.sglang.shared_slab import SharedSlabs
from dynamo_connectors.tiers.chunks import capacity_chunks_for, chunk_blocks_for
from dynamo_connectors.tiers.nvme import NvmeStore, slot_bytes
from dynamo_connectors.tiers.object import ObjectSettings, ObjectStore
from dynamo_connectors.tiers.object_format import object_bytes
from dynamo_connectors.weights import can_be_met_again

logger = logging.getLogger(__name__)

#: Facts of SGLang's storage config that say which part of which KV a page holds. Data-parallel ranks hold the same.
_PARALLEL_FACTS = ("attn_cp_rank", "attn_cp_size", "dcp_rank", "dcp_size", "is_mla_model", "tp_lcm_size")


class Pages(Protocol):
    """The pages of one pool: a `PageStore`, or `SharedPages` where another rank writes them."""

    def note_use(self, chain: Sequence[BlockKey]) -> None: ...
    def match(self, keys: Sequence[BlockKey], before: Sequence[BlockKey] | None = ()) -> int: ...
    def present(self, keys: Sequence[BlockKey]) -> list[bool]: ...
    def put(
        self, keys: Sequence[BlockKey], pages: Sequence[Page], before: Sequence[BlockKey] | None = ()
    ) -> list[bool]: ...
    def get(self, keys: Sequence[BlockKey], pages: Sequence[Page], before: Sequence[BlockKey] = ()) -> list[bool]: ...
    def suspend(self) -> None: ...
    def resume(self) -> None: ...
    def clear(self) -> None: ...
    def counts(self) -> PageCounts: ...
    def lower_counts(self) -> dict[str, PageCounts]: ...
    def close(self, deadline: float | None = None) -> None: ...
    def check(self) -> None: ...


@dataclass(frozen=True)
class Worker:
    """One scheduler process: SGLang's storage config, the engine's facts by `Namespace` field, its share of the tiers.

    `watch` gives, for a pool's name and the keys that it had from the start, who is told of changes.
    """

    config: Any
    engine_facts: Mapping[str, str]
    tiers: KvbmConfig
    watch: Callable[[str, Sequence[BlockKey]], Watcher]


class PoolSet:
    """Thread-safe. No lock is held while pages move."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._pools: dict[str, NamedPool] = {}
        self._pages: dict[str, Pages] = {}

    def add(self, pool: NamedPool) -> None:
        """A pool that comes late takes its share of the space: the others are opened anew with less."""
        if pool.name.startswith("draft") and is_replicated(pool.name, self._worker.config):
            raise UnsupportedLayoutError(
                f"this model's draft cache ({pool.name}) differs between tensor-parallel ranks while only one rank may "
                "write it; drop --hicache-storage-backend dynamo, or run with --tp-size 1"
            )
        self.close()
        with self._lock:
            self._pools[pool.name] = pool

    def pool(self, name: str) -> NamedPool | None:
        return self._pools.get(name)

    def pages(self, name: str) -> Pages | None:
        return self._pages.get(name)

    def all_pages(self) -> dict[str, Pages]:
        return self._pages

    def open(self) -> bool:
        """Creates or takes over the slabs; False when that was done before. Raises `ConfigError`."""
        with self._lock:
            if self._pages or not self._pools:
                return False
            self._refuse_object_store()
            capacities = share_space(self._worker.tiers.nvme_bytes, self._pools)
            opened: dict[str, Pages] = {}
            try:
                for name, pool in self._pools.items():
                    opened[name] = self._open_pool(pool, capacities[name])
            except BaseException:
                for pages in opened.values():
                    pages.close()
                raise
            self._pages = opened
        return True

    def close(self) -> None:
        """Ends transfers in flight and lets the slabs go; they stay for the next engine. Idempotent.

        Within `page_io.CLOSE_SECONDS`, however many of its disks and stores hang.
        """
        with self._lock:
            closed, self._pages = self._pages, {}
        counted = {name: pages.counts() for name, pages in closed.items()}
        deadline = time.monotonic() + page_io.CLOSE_SECONDS
        # At the same time: disks that hang shall not add up.
        closers = [
            threading.Thread(target=pages.close, args=(deadline,), name="dynamo-kvbm-close", daemon=True)
            for pages in closed.values()
        ]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join()
        for name, counts in counted.items():
            logger.info(
                "dynamo: nvme_ssd tier closed (pool %s): %d pages written, %d read, dropped %s, failed to load %s",
                name,
                counts.written_pages,
                counts.read_pages,
                counts.dropped or "none",
                counts.load_failures or "none",
            )

    def check(self) -> None:
        for pages in self._pages.values():
            pages.check()

    def _open_pool(self, pool: NamedPool, capacity: int) -> Pages:
        worker, row_bytes = self._worker, pool.shape.row_bytes
        directory, namespace = worker.tiers.nvme_path, self._namespace(pool)
        assert directory is not None, "a worker has no directory"
        if is_replicated(pool.name, worker.config) and worker.config.tp_rank != 0:
            logger.info("dynamo: pool %s is read from the slabs that rank 0 writes in %s", pool.name, directory)
            slabs = SharedSlabs(directory, namespace, row_bytes)
            return SharedPages(NVME_SSD, slabs, worker.watch(pool.name, ()))
        per_page = slot_bytes(row_bytes)
        if per_page > 2 * row_bytes and pool.name == MAIN_POOL:
            logger.warning(
                "dynamo: a page of %d tokens has %d bytes but takes %d on disk; raise --page-size (16 to 64)",
                pool.shape.page_tokens,
                row_bytes,
                per_page,
            )
        store = NvmeStore(directory, capacity, row_bytes, namespace, can_be_met_again(namespace.weights))
        logger.info(
            "dynamo: nvme_ssd tier %s (pool %s): %d pages of %d tokens, %d bytes each, %.2f GB, direct I/O %s",
            store.path,
            pool.name,
            capacity,
            pool.shape.page_tokens,
            row_bytes,
            capacity * per_page / GIGABYTE,
            "on" if store.direct else "off",
        )
        watcher = worker.watch(pool.name, [key for _, key in store.recovered])
        try:
            lower = self._open_object_tier(row_bytes, namespace)
        except BaseException:
            store.close()
            raise
        return PageStore(NVME_SSD, store, watcher, lower=lower)

    def _open_object_tier(self, row_bytes: int, namespace: Namespace) -> ObjectTier | None:
        tiers = self._worker.tiers
        if tiers.object_url is None:
            return None
        chunk_blocks = chunk_blocks_for(row_bytes)
        capacity = capacity_chunks_for(tiers.object_bytes, object_bytes(row_bytes, chunk_blocks))
        settings = ObjectSettings(tiers.object_url, tiers.object_endpoint_url, tiers.object_deadline_seconds)
        store = ObjectStore(settings, row_bytes, chunk_blocks, namespace)
        logger.info(
            "dynamo: object_store tier %s: %d objects of %d pages each", tiers.object_url, capacity, chunk_blocks
        )
        return ObjectTier(store, capacity, tiers.object_min_touches)

    def _refuse_object_store(self) -> None:
        if self._worker.tiers.object_url is None:
            return
        if len(self._pools) > 1 or is_replicated(MAIN_POOL, self._worker.config):
            raise ConfigError(
                "--kvbm-object-url does not work yet for models whose cache lies in several pools, or is the same on "
                "several tensor-parallel ranks; drop it"
            )

    def _namespace(self, pool: NamedPool) -> Namespace:
        config, facts = self._worker.config, self._worker.engine_facts
        parallel = [(name, getattr(config, name, None)) for name in _PARALLEL_FACTS]
        return Namespace(
            engine="sglang",
            model=facts.get("model", config.model_name or ""),
            revision=facts.get("revision", ""),
            weights=facts.get("weights", ""),
            dtype=str(getattr(pool.pool, "dtype", "")),
            layout_fingerprint=layout_fingerprint(pool.pool, pool.shape),
            block_size_tokens=pool.shape.page_tokens,
            tp_rank=0 if is_replicated(pool.name, config) else config.tp_rank,
            tp_size=config.tp_size,
            pp_rank=config.pp_rank,
            pp_size=config.pp_size,
            key_rules=repr((pool.name, parallel, facts.get("key_rules", ""))),
        )
