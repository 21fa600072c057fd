"""What the owner of the index asks the owner of the bytes to do, and what it hears back. Plain records, picklable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dynamo_connectors.blocks import BlockKey

#: Positions in the block manager's order of tiers.
DRAM_TIER = 0
DISK_TIER = 1


class StoreItem(NamedTuple):
    key: BlockKey
    block: int
    slot: int


class LoadItem(NamedTuple):
    key: BlockKey
    tier: int
    slot: int
    block: int


class SpillItem(NamedTuple):
    key: BlockKey
    source_slot: int
    target_slot: int


@dataclass(frozen=True)
class StoreJob:
    """Copies HBM blocks to DRAM slots."""

    job_id: int
    items: tuple[StoreItem, ...]


@dataclass(frozen=True)
class LoadJob:
    """Copies DRAM or disk slots to the HBM blocks of one waiting request."""

    job_id: int
    request_id: str
    items: tuple[LoadItem, ...]
    #: HBM blocks that were promised to the request but whose source is gone: they count as failed.
    missing_blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class SpillJob:
    """Copies DRAM slots to disk slots."""

    job_id: int
    items: tuple[SpillItem, ...]


@dataclass(frozen=True)
class JobReport:
    """The end of a job. Keys in `failed` gave no bytes, each with a reason fit for a metric label."""

    job_id: int
    failed: Mapping[BlockKey, str]
