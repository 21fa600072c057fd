"""What a tier holds, in numbers. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class IndexStats:
    """A snapshot. Counts are blocks; `pinned_blocks` are those somebody reads, served or quarantined."""

    capacity_blocks: int
    ready_blocks: int
    filling_blocks: int
    pinned_blocks: int
    evicting_blocks: int
    quarantined_blocks: int
    evicted_blocks_total: int

    def times(self, blocks: int) -> IndexStats:
        """Of a tier whose entries hold that many blocks each."""
        if blocks == 1:
            return self
        return IndexStats(**{name: blocks * entries for name, entries in asdict(self).items()})
