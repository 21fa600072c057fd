"""SGLang's storage calls, answered from a `PageStore`. Imports no engine: `hicache.py` adds SGLang's base class.

SGLang's keys name tokens only, and its host pages are bytes at addresses; the namespace and the checked header make
sure that nothing is read back as anything else.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from dynamo_connectors.blocks import BlockKey, Namespace
from dynamo_connectors.config import GIGABYTE, NVME_SSD
from dynamo_connectors.errors import ConfigError, StoreError, UnsupportedLayoutError
from dynamo_connectors.sglang import live
from dynamo_connectors.sglang.host_pages import HostPool, PageShape, layout_fingerprint, locate_pages, page_shape
from dynamo_connectors.sglang.metrics import StorageMeter
from dynamo_connectors.sglang.page_store import Page, PageCounts, PageStore, Transfer
from dynamo_connectors.sglang.settings import worker_storage
from dynamo_connectors.tiers.nvme import NvmeStore, slot_bytes

logger = logging.getLogger(__name__)

#: Of SGLang's named pools, the one whose pages `register_mem_pool_host` hands us.
_MAIN_POOL = "kv"


class HiCacheBackend:
    """One worker's nvme_ssd tier behind SGLang's zero-copy interface (`interface_v1`). Thread-safe."""

    def __init__(self, storage_config: Any, kwargs: object = None) -> None:
        self._facts = storage_config
        ranks = storage_config.tp_size * storage_config.pp_size
        if storage_config.is_mla_model and storage_config.tp_size > 1:
            # One rank writes for all, and each rank's disk space is its own: the others would never hit.
            raise ConfigError(
                "--hicache-storage-backend dynamo does not share pages between tensor-parallel ranks, which this "
                "model's cache needs; run it with --tp-size 1 or attention data parallelism, or drop the flag"
            )
        self._directory, self._share_bytes = worker_storage(storage_config.extra_config or {}, ranks)
        self._meter = StorageMeter() if storage_config.enable_storage_metrics else None
        self._pool: HostPool | None = None
        self._shape = PageShape(1, ())
        self._pages: PageStore | None = None

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Creates the slab: only now is the size of a page known. Raises `ConfigError` or `UnsupportedLayoutError`."""
        self.close()
        shape = page_shape(mem_pool_host, self._first_page(mem_pool_host))
        per_page = slot_bytes(shape.row_bytes)
        capacity = self._share_bytes // per_page
        if capacity < 1:
            raise ConfigError(
                f"--kvbm-nvme-gb leaves {self._share_bytes / GIGABYTE:g} GB for each worker, less than one page of "
                f"{per_page} bytes; raise it"
            )
        if per_page > 2 * shape.row_bytes:
            logger.warning(
                "dynamo: a page of %d tokens has %d bytes but takes %d on disk; raise --page-size (16 to 64)",
                shape.page_tokens,
                shape.row_bytes,
                per_page,
            )
        store = NvmeStore(self._directory, capacity, shape.row_bytes, self._namespace(mem_pool_host, shape))
        self.mem_pool_host = self._pool = mem_pool_host
        self._shape = shape
        self._pages = PageStore(NVME_SSD, store)
        live.add(self)
        logger.info(
            "dynamo: nvme_ssd tier %s: %d pages of %d tokens, %d bytes each, %.2f GB, direct I/O %s",
            store.path,
            capacity,
            shape.page_tokens,
            shape.row_bytes,
            capacity * per_page / GIGABYTE,
            "on" if store.direct else "off",
        )

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        name = str(getattr(host_pool_name, "value", host_pool_name))
        if name != _MAIN_POOL:
            raise UnsupportedLayoutError(
                f"this model keeps part of its cache in a second pool ({name}), which --hicache-storage-backend dynamo "
                "cannot store yet; drop the flag"
            )

    def batch_exists(self, keys: list[str], extra_info: object = None) -> int:
        return 0 if self._pages is None else self._pages.match(_block_keys(keys))

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: object = None) -> list[bool]:
        located = self._locate(keys, host_indices)
        if self._pages is None or located is None:
            return [False] * len(keys)
        kept = self._pages.put(_block_keys(keys), located)
        self._report()
        return kept

    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: object = None) -> list[bool]:
        located = self._locate(keys, host_indices)
        if self._pages is None or located is None:
            return [False] * len(keys)
        filled = self._pages.get(_block_keys(keys), located)
        self._report()
        return filled

    def get(self, *_: object, **__: object) -> Any:
        raise _not_offered()

    batch_get = get
    set = get
    batch_set = get

    def clear(self) -> None:
        if self._pages is not None:
            self._pages.clear()
            self._report()

    def suspend(self) -> None:
        logger.info("dynamo: weights are changing; no KV is stored or served until the cache is flushed")
        if self._pages is not None:
            self._pages.suspend()
            self._report()

    def resume(self) -> None:
        if self._pages is not None:
            self._pages.resume()
            self._report()

    def counts(self) -> PageCounts | None:
        return None if self._pages is None else self._pages.counts()

    def take_transfers(self) -> list[Transfer]:
        return [] if self._pages is None else self._pages.take_transfers()

    def close(self) -> None:
        """Removes the slab. Idempotent; afterwards everything is a miss."""
        pages, self._pages = self._pages, None
        if pages is None:
            return
        live.remove(self)
        counts = pages.counts()
        pages.close()
        logger.info(
            "dynamo: nvme_ssd tier closed: %d pages written, %d read, dropped %s, failed to load %s",
            counts.written_pages,
            counts.read_pages,
            counts.dropped or "none",
            counts.load_failures or "none",
        )

    def check(self) -> None:
        if self._pages is not None:
            self._pages.check()

    def _first_page(self, pool: HostPool) -> Any:
        """The token slots of page 0."""
        return range(pool.page_size)

    def _locate(self, keys: list[str], host_indices: Any) -> Sequence[Page] | None:
        if self._pool is None:
            return None
        try:
            return locate_pages(self._pool, host_indices, len(keys), self._shape)
        except StoreError as error:
            logger.error("dynamo: a transfer is refused: %s", error)
            return None

    def _namespace(self, pool: HostPool, shape: PageShape) -> Namespace:
        facts = self._facts
        others = ("attn_cp_rank", "attn_cp_size", "dp_rank", "dcp_rank", "dcp_size", "is_mla_model", "tp_lcm_size")
        return Namespace(
            engine="sglang",
            model=facts.model_name or "",
            revision="",
            dtype=str(getattr(pool, "dtype", "")),
            layout_fingerprint=layout_fingerprint(pool, shape),
            block_size_tokens=shape.page_tokens,
            tp_rank=facts.tp_rank,
            tp_size=facts.tp_size,
            pp_rank=facts.pp_rank,
            pp_size=facts.pp_size,
            key_rules=repr([(name, getattr(facts, name, None)) for name in others]),
        )

    def _report(self) -> None:
        if self._meter is not None and self._pages is not None:
            self._meter.record(NVME_SSD, self._pages.counts())


def _block_keys(keys: list[str]) -> list[BlockKey]:
    """SGLang's page hashes are text (64 hex digits): their bytes are the key."""
    return [BlockKey(key.encode()) for key in keys]


def _not_offered() -> ConfigError:
    return ConfigError(
        'the dynamo storage backend only speaks the zero-copy interface; put "interface_v1": 1 into '
        "--hicache-storage-backend-extra-config"
    )
