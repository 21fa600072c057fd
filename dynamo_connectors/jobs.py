"""What the owner of the index asks the owner of the bytes to do, and what it hears back. Plain records, picklable.

Tiers go by name (`config.TIER_ORDER`). An object of the object_store tier is a chunk of blocks: `chunk` is its name and
`row` the place of the block in it; in the peer tier `chunk` is the ticket that says who holds the block and under which
lease; in the other tiers a slot says it all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dynamo_connectors.blocks import BlockKey


class StoreItem(NamedTuple):
    key: BlockKey
    block: int
    slot: int


class LoadItem(NamedTuple):
    key: BlockKey
    tier: str
    slot: int
    block: int
    chunk: BlockKey | None = None
    row: int = 0


class MoveItem(NamedTuple):
    key: BlockKey
    source_slot: int
    target_slot: int
    chunk: BlockKey | None = None
    row: int = 0


@dataclass(frozen=True)
class StoreJob:
    """Copies HBM blocks to host_dram slots."""

    job_id: int
    items: tuple[StoreItem, ...]


@dataclass(frozen=True)
class LoadJob:
    """Copies blocks of the tiers below to the HBM blocks of one waiting request."""

    job_id: int
    request_id: str
    items: tuple[LoadItem, ...]
    #: HBM blocks that were promised to the request but whose source is gone: they count as failed.
    missing_blocks: tuple[int, ...] = ()
    #: The request may be computed on as soon as the engine's own stream is sure to see the bytes.
    may_run_ahead: bool = False
    #: And all that it computes goes into other blocks, so that a layer need only wait for its own part.
    by_layers: bool = False


@dataclass(frozen=True)
class MoveJob:
    """Copies blocks between two tiers below HBM: down (offload) or up (prefetch)."""

    job_id: int
    source_tier: str
    target_tier: str
    items: tuple[MoveItem, ...]


@dataclass(frozen=True)
class EraseJob:
    """Erases chunks that have left the index of a tier; their places are taken until this job has ended."""

    job_id: int
    tier: str
    chunks: tuple[BlockKey, ...]


@dataclass(frozen=True)
class ExportJob:
    """Lets the peer that holds `lease` read host_dram slots; ends with the lease, however that ends."""

    job_id: int
    lease: bytes
    slots: tuple[tuple[BlockKey, int], ...]


class Moved(NamedTuple):
    """Bytes read from `tier` (load, prefetch) or written to it (store, offload), and how long that took.

    A load that got nothing from a lower tier in time is told too, with its wait.
    """

    tier: str
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class JobReport:
    """The end of a job. Keys in `failed` gave no bytes, each with a reason fit for a metric label.

    `sent`: it moved blocks down, and bytes of it may lie in that tier, however it ended.
    """

    job_id: int
    failed: Mapping[BlockKey, str]
    moved: tuple[Moved, ...] = ()
    sent: bool = False
