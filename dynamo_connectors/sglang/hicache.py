"""The class that SGLang loads: our backend under SGLang's own base class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

from dynamo_connectors.config import GIGABYTE
from dynamo_connectors.sglang import compat
from dynamo_connectors.sglang.backend import HiCacheBackend


class DynamoHiCache(HiCacheBackend, HiCacheStorage):
    """`--hicache-storage-backend dynamo`."""

    def __init__(self, storage_config: Any, kwargs: object = None) -> None:
        compat.require_weight_hooks()
        self._is_publisher = compat.publishes_kv_events(storage_config)
        super().__init__(storage_config, kwargs)

    def on_host_pools_registered(self) -> None:
        """SGLang 0.5.23. A draft model's pools come later still; their slabs are opened with the rest at first use."""
        if not compat.has_draft_model():
            self.open()

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: Sequence[Any] | None = None, extra_info: object = None
    ) -> Any:
        return compat.pool_transfer_result(self.match_pools(keys, pool_transfers, extra_info))

    def get_stats(self) -> Any:
        """SGLang's own histograms: pages and GB/s of every batch since the last call."""
        stats = compat.storage_metrics_class()()
        for transfer in self.take_transfers():
            speed = transfer.num_bytes / GIGABYTE / max(transfer.seconds, 1e-9)
            (stats.prefetch_pgs if transfer.is_read else stats.backup_pgs).append(transfer.pages)
            (stats.prefetch_bandwidth if transfer.is_read else stats.backup_bandwidth).append(speed)
        return stats

    def _first_page(self, pool: Any) -> Any:
        return torch.arange(pool.page_size, dtype=torch.int64)

    def _engine_facts(self) -> Mapping[str, str]:
        return compat.engine_facts()

    def _publishes_events(self) -> bool:
        return self._is_publisher
