"""The one contract of every tier: an index that decides, a store that holds bytes under the same slot numbers.

In vLLM the scheduler owns the index and each worker owns a store; in SGLang one process owns both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers.index import IndexStats, TierIndex

#: Anything that exposes a writable, contiguous range of bytes.
Buffer = memoryview


class TierStore(Protocol):
    """The bytes of one tier's slots. Calls on different slots may run on different threads at the same time."""

    row_bytes: int
    capacity_blocks: int

    def write(self, slot: int, key: BlockKey, row: Buffer) -> None:
        """Keeps `row` (`row_bytes` long) in `slot`. Raises `StoreError`; the slot then holds nothing readable."""

    def read(self, slot: int, key: BlockKey, into: Buffer) -> None:
        """Fills `into` with the bytes written for `key`.

        Raises `StoreError` when `slot` does not hold `key`, or holds it damaged; `into` is then undefined.
        """

    def close(self) -> None:
        """Gives everything back. Idempotent."""


@dataclass(frozen=True)
class Tier:
    """An index and a store over the same slots, for a process that owns both."""

    name: str
    index: TierIndex
    store: TierStore

    def lookup(self, keys: Sequence[BlockKey]) -> int:
        return self.index.lookup(keys)

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
