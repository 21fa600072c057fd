"""Blocks of a peer, asked for as a load does it: while one READ is asked about, others are under way."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.tiers.base import Batch, Place
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.transport.peer_tier import PeerTier
from dynamo_connectors.transport.tickets import Ticket


def load(tier: PeerTier, ticket: Ticket, dram: DramStore, parts: Iterable[range], reads_at_once: int) -> float:
    """Seconds until all `parts` are there, each one READ. A block's key is the number of its row."""
    encoded = BlockKey(ticket.encode())
    started = time.perf_counter()
    under_way: deque[Batch] = deque()
    for rows in parts:
        places = [Place(BlockKey(b"%d" % row), 0, encoded) for row in rows]
        under_way += tier.read(places, [memoryview(dram.rows[row]) for row in rows])
        if len(under_way) == reads_at_once:
            _await(under_way.popleft())
    for batch in under_way:
        _await(batch)
    return time.perf_counter() - started


def _await(batch: Batch) -> None:
    assert not any(batch.outcome.result()), batch.outcome.result()
