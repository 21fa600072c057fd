"""SGLang's storage calls, translated. Imports no engine: `hicache.py` adds SGLang's base class.

SGLang's keys name tokens only, and its host pages are bytes at addresses; the namespace and the checked header make
sure that nothing is read back as anything else.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_connectors.block_manager import Change
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.config import NVME_SSD
from dynamo_connectors.errors import ConfigError, DynamoConnectorsError
from dynamo_connectors.sglang import chains, live
from dynamo_connectors.sglang.host_pages import page_shape
from dynamo_connectors.sglang.l3_events import Removed, Stored, TierEvents
from dynamo_connectors.sglang.metrics import StorageMeter
from dynamo_connectors.sglang.page_io import Page
from dynamo_connectors.sglang.page_store import PageCounts, Transfer, Watcher
from dynamo_connectors.sglang.pool_match import PoolMatch, PoolNeed, match_pools
from dynamo_connectors.sglang.pool_set import Pages, PoolSet, Worker
from dynamo_connectors.sglang.pools import MAIN_POOL, NamedPool, pool_name
from dynamo_connectors.sglang.settings import worker_storage

logger = logging.getLogger(__name__)

#: Transfers remembered between two calls of `take_transfers`.
_MAX_TRANSFERS = 1024
#: Requests remembered as counted. SGLang asks again for those that wait.
_MAX_REQUESTS = 256


class HiCacheBackend:
    """One worker's nvme_ssd tier behind SGLang's zero-copy interfaces, v1 and v2. Thread-safe."""

    def __init__(self, storage_config: Any, kwargs: object = None) -> None:
        ranks = storage_config.tp_size * storage_config.pp_size
        tiers = worker_storage(storage_config.extra_config or {}, ranks)
        self._is_chain_needed = tiers.object_url is not None
        facts = dict(self._engine_facts())
        if live.backends.has_new_weights:
            # Nobody can say which weights these are: what is kept now is for this backend alone.
            facts["weights"] = f"changed:{uuid.uuid4().hex}"
        self._set_of_pools = PoolSet(Worker(storage_config, facts, tiers, self._watcher))
        self._meter = StorageMeter() if storage_config.enable_storage_metrics else None
        self._is_off = False
        self._transfers: deque[Transfer] = deque(maxlen=_MAX_TRANSFERS)
        self._last_requests: deque[str] = deque(maxlen=_MAX_REQUESTS)
        self._events: TierEvents | None = None
        #: Guards `_events`; innermost, taken under the lock of a pool's pages.
        self._events_lock = threading.Lock()

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The pool of the KV itself. Raises `UnsupportedLayoutError`."""
        self.mem_pool_host = mem_pool_host
        self._is_off = False
        self._add_pool(MAIN_POOL, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """A second pool of a hybrid model. Raises `UnsupportedLayoutError`."""
        main = self._set_of_pools.pool(MAIN_POOL)
        if main is None or host_pool is not main.pool:
            self._add_pool(pool_name(host_pool_name), host_pool)

    def open(self) -> None:
        """Creates or takes over the slabs, now that all pools are known. Idempotent. Raises `ConfigError`.

        Without this call it happens at the first use, where an error means that nothing is kept.
        """
        if self._set_of_pools.open():
            live.backends.add(self)
            self._report()

    def batch_exists(self, keys: list[str], extra_info: object = None) -> int:
        pages = self._pages(MAIN_POOL)
        return 0 if pages is None else pages.match(_block_keys(keys), self._before(extra_info))

    def note_use(self, request: str, keys: Sequence[str], prefix_keys: Sequence[str] | None) -> None:
        """A request uses this chain. Counts once per request, however often SGLang asks."""
        pages = self._pages(MAIN_POOL)
        if pages is None or not chains.is_whole(prefix_keys) or request in self._last_requests:
            return
        self._last_requests.append(request)
        pages.note_use(_block_keys([*(prefix_keys or ()), *keys]))

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def match_pools(self, keys: list[str], transfers: Sequence[Any] | None, extra_info: object = None) -> PoolMatch:
        """How far a prefix can be used when every pool that `transfers` name must hold its part."""
        wanted = _block_keys(keys)
        needs = []
        for transfer in transfers or ():
            policy = pool_name(transfer.hit_policy)
            if policy not in ("all_pages", "trailing_pages"):
                return PoolMatch((), {})
            pages = self._pages(pool_name(transfer.name))
            present = [False] * len(wanted) if pages is None else pages.present(wanted)
            last = max(1, len(transfer.keys or ())) if policy == "trailing_pages" else None
            needs.append(PoolNeed(pool_name(transfer.name), present, last))
        return match_pools(MAIN_POOL, self.batch_exists(keys, extra_info), needs)

    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: object = None) -> list[bool]:
        # A decode worker keeps what it has computed without telling what comes before.
        is_known = getattr(extra_info, "prefix_keys", None) is not None
        return self._set(MAIN_POOL, keys, host_indices, self._before(extra_info) if is_known else None)

    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: object = None) -> list[bool]:
        return self._get(MAIN_POOL, keys, host_indices, self._before(extra_info))

    def batch_set_v2(self, transfers: Sequence[Any], extra_info: object = None) -> dict[str, list[bool]]:
        return {each.name: self._set(pool_name(each.name), each.keys or [], each.host_indices) for each in transfers}

    def batch_get_v2(self, transfers: Sequence[Any], extra_info: object = None) -> dict[str, list[bool]]:
        return {each.name: self._get(pool_name(each.name), each.keys or [], each.host_indices) for each in transfers}

    def get(self, *_: object, **__: object) -> Any:
        raise _not_offered()

    batch_get = get
    set = get
    batch_set = get

    def clear(self) -> None:
        """Forgets every page, also for the next engine. Pages kept from now on outlive this one again."""
        for pages in self._set_of_pools.all_pages().values():
            pages.clear()
        self._report()
        if not live.backends.has_new_weights:
            self._set_of_pools.close()  # opened anew at the next use

    def suspend(self) -> None:
        logger.info("dynamo: weights are changing; no KV is stored or served until the cache is flushed")
        for pages in self._set_of_pools.all_pages().values():
            pages.suspend()
        self._report()

    def resume(self) -> None:
        for pages in self._set_of_pools.all_pages().values():
            pages.resume()
        self._report()

    def describe(self, keys: Sequence[str], tokens: Sequence[int], parent: str | None) -> None:
        """A chain that SGLang looked up: what the events of its pages say."""
        with self._events_lock:
            if self._events is not None:
                above = None if parent is None else _block_keys([parent])[0]
                self._events.describe(_block_keys(keys), tokens, above)

    def take_events(self) -> tuple[list[Stored | Removed], int]:
        """Events since the last call, and how many tokens a page has."""
        with self._events_lock:
            return ([], 0) if self._events is None else (self._events.take(), self._events.page_tokens)

    def routers_forgot(self) -> None:
        with self._events_lock:
            if self._events is not None:
                self._events.routers_forgot()

    def counts(self, pool: str = MAIN_POOL) -> PageCounts | None:
        pages = self._set_of_pools.pages(pool)
        return None if pages is None else pages.counts()

    def take_transfers(self) -> list[Transfer]:
        """What moved since the last call."""
        return [self._transfers.popleft() for _ in range(len(self._transfers))]

    def close(self) -> None:
        """Ends transfers in flight and lets the slabs go; they stay for the next engine. Idempotent."""
        self._is_off = True
        live.backends.remove(self)
        self._set_of_pools.close()

    def check(self) -> None:
        self._set_of_pools.check()
        with self._events_lock:
            if self._events is not None:
                self._events.check()

    def _add_pool(self, name: str, host_pool: Any) -> None:
        shape = page_shape(host_pool, self._first_page(host_pool))
        self._set_of_pools.add(NamedPool(name, host_pool, shape))

    def _pages(self, name: str) -> Pages | None:
        if not self._set_of_pools.all_pages() and not self._is_off:
            try:
                self.open()
            except DynamoConnectorsError as error:
                self._is_off = True
                logger.error("dynamo: the nvme_ssd tier is off: %s", error)
        return self._set_of_pools.pages(name)

    def _set(
        self, name: str, keys: Sequence[str], host_indices: Any, before: Sequence[BlockKey] | None = ()
    ) -> list[bool]:
        pages, located = self._located(name, len(keys), host_indices)
        if pages is None:
            return [False] * len(keys)
        kept = pages.put(_block_keys(keys), located, before)
        self._report()
        return kept

    def _get(
        self, name: str, keys: Sequence[str], host_indices: Any, before: Sequence[BlockKey] | None = ()
    ) -> list[bool]:
        pages, located = self._located(name, len(keys), host_indices)
        if pages is None or before is None:
            return [False] * len(keys)
        filled = pages.get(_block_keys(keys), located, before)
        self._report()
        return filled

    def _located(self, name: str, num_pages: int, host_indices: Any) -> tuple[Pages | None, Sequence[Page]]:
        """Where to keep pages, or whence to get them, and where they lie in memory; None when that is not known."""
        pages, pool = self._pages(name), self._set_of_pools.pool(name)
        located = None if pool is None else pool.locate(num_pages, host_indices)
        return (None, ()) if located is None else (pages, located)

    def _before(self, extra_info: object) -> list[BlockKey] | None:
        """The chain up to the pages that SGLang asks about, as far as it says; None when it is needed and unknown."""
        prefix_keys = getattr(extra_info, "prefix_keys", None)
        if chains.is_whole(prefix_keys):
            return _block_keys(prefix_keys or ())
        return None if self._is_chain_needed else []

    def _watcher(self, pool: str, recovered: Sequence[BlockKey]) -> Watcher:
        """Routers are told of the main pool only: its pages are what a prefix is made of."""
        main = self._set_of_pools.pool(MAIN_POOL)
        if pool != MAIN_POOL or main is None or not self._publishes_events():
            return Watcher(on_transfer=self._note_transfer, on_background=self._report)
        with self._events_lock:
            self._events = TierEvents(main.shape.page_tokens)
            self._events.recovered(NVME_SSD, recovered)
        return Watcher(self._note_changes, self._note_transfer, self._report)

    def _note_changes(self, changes: Sequence[Change]) -> None:
        with self._events_lock:
            if self._events is not None:
                for change in changes:
                    self._events.note(change.kind, change.tier, change.key)

    def _note_transfer(self, transfer: Transfer) -> None:
        self._transfers.append(transfer)
        if self._meter is not None:
            self._meter.observe(transfer)

    def _first_page(self, pool: Any) -> Any:
        """The token slots of page 0."""
        return range(pool.page_size)

    def _engine_facts(self) -> Mapping[str, str]:
        """What the engine knows about its model beyond the storage config, by `Namespace` field."""
        return {}

    def _publishes_events(self) -> bool:
        """Whether this worker's blocks go into SGLang's event stream."""
        return False

    def _report(self) -> None:
        if self._meter is not None:
            for name, pages in self._set_of_pools.all_pages().items():
                self._meter.record(name, pages.counts())
                for tier, counts in pages.lower_counts().items():
                    self._meter.record(name, counts, tier)


def _block_keys(keys: Sequence[str]) -> list[BlockKey]:
    """SGLang's page hashes are text (64 hex digits): their bytes are the key."""
    return [BlockKey(key.encode()) for key in keys]


def _not_offered() -> ConfigError:
    return ConfigError(
        'the dynamo storage backend only speaks the zero-copy interface; put "interface_v1": 1 into '
        "--hicache-storage-backend-extra-config"
    )
