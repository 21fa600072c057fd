"""An index and a store joined, so that the suites can drive a whole tier with one call. The engines keep them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers.base import Buffer, TierStore
from dynamo_connectors.tiers.index import TierIndex
from dynamo_connectors.tiers.index_stats import IndexStats


@dataclass(frozen=True)
class Tier:
    """An index and a store over the same slots."""

    name: str
    index: TierIndex
    store: TierStore

    def lookup(self, keys: Sequence[BlockKey]) -> int:
        """Length of the leading run of `keys` that can be read now."""
        return sum(1 for _ in takewhile(self.index.__contains__, keys))

    def write(self, key: BlockKey, row: Buffer) -> bool:
        """Keeps one block. False when it was already here, or when there is no room."""
        slot = self.index.reserve(key)
        self.index.take_evicted()  # nobody here reports them; kept, they would pile up
        if slot is None:
            return False
        try:
            self.store.write(slot, key, row)
        except BaseException:
            self.index.abort(slot)
            raise
        return self.index.commit(slot)

    def read(self, key: BlockKey, into: Buffer) -> bool:
        """Fills `into`. False on a miss; a damaged block is dropped, then `StoreError` tells why."""
        slot = self.index.pin(key)
        if slot is None:
            return False
        try:
            self.store.read(slot, key, into)
        except StoreError:
            self.index.discard(key)
            raise
        finally:
            self.index.unpin(slot)
        return True

    def evict(self, num_bytes: int) -> int:
        """Frees at least `num_bytes` if that many are unpinned; returns the bytes freed."""
        blocks = -(-num_bytes // self.store.row_bytes)
        freed = self.index.evict(blocks)
        self.index.take_evicted()
        return freed * self.store.row_bytes

    def stats(self) -> IndexStats:
        return self.index.stats()

    def check(self) -> None:
        self.index.check()
        assert self.index.capacity_blocks <= self.store.capacity_blocks, f"{self.name}: more slots than bytes"

    def close(self) -> None:
        self.store.close()
