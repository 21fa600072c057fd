"""The tiers below host memory as loads see them: each with the threads and the memory that loads from it take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from dynamo_kernels.block_view import BlockView
from dynamo_kernels.compression import Codec

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.config import PEER
from dynamo_connectors.hbm_rows import HbmRows
from dynamo_connectors.jobs import LoadItem
from dynamo_connectors.lanes import Lane
from dynamo_connectors.loads import MOST_ROWS, LoadFromBelow
from dynamo_connectors.staging import StagingRows
from dynamo_connectors.tiers.base import Batch, LowerTier, Place
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.transport.peer_tier import PeerTier

#: Memory that loads from a tier below pass through (from peers as much more as one load of theirs is larger), and the
#: rows that it has at least (enough to keep a disk busy).
_STAGING_BYTES = 64 << 20
_MIN_STAGING_ROWS = 16
#: Loads that run at a time from each tier below. Those from a faster tier never wait for those from a slower one.
_LOADS_FROM_BELOW = 4
#: Reads of a peer that one load has under way, and blocks of one: it is asked before each, and bytes come meanwhile.
#: Share of bare NIXL's bandwidth on an idle host: 0.85 with rows of 1 MiB, 0.93 with 2 MiB; of the same memory, four
#: reads of 16 blocks have 0.77 and 0.88, one of 64 has 0.89 and 0.96 (but nothing comes while it is taken up to HBM).
PEER_READS, PEER_READ_ROWS = 2, 2 * MOST_ROWS
#: Shares of the rows in HBM: what one load may hold, and one read.
_LOADS_AT_A_TIME, _READS_AT_A_TIME = 2, 8
#: A load is so many reads at least, for one to be filled while another is read, unless they had fewer rows than that.
_READS_OF_A_LOAD, _LEAST_OF_A_READ = 4, 16
#: Why a block does not come from a peer's window, and may from its host memory all the same.
_ELSEWHERE = frozenset({"gone", "disconnected"})


class Below:
    """A tier. `make` gets the slab that it reads into."""

    #: Of one load, and of one read of it.
    most_rows = rows_of_a_read = MOST_ROWS

    def __init__(
        self, name: str, make: Callable[[DramStore], LowerTier], dram: DramStore, hbm: BlockView, codec: Codec | None
    ) -> None:
        rows = min(max(_MIN_STAGING_ROWS, _STAGING_BYTES // dram.row_bytes), 4 * _MIN_STAGING_ROWS)
        slab = dram.another(rows * self.most_rows // MOST_ROWS)
        self.staging = StagingRows(slab, hbm, codec)
        self.tier = make(slab)
        self.lane = Lane(f"kvbm-load-{name}", _LOADS_FROM_BELOW)

    def load(self, items: Sequence[LoadItem], seconds: float, failed: dict[BlockKey, str]) -> int:
        """As `LoadFromBelow.run`."""
        return LoadFromBelow(self.tier, self.staging, self.most_rows, self.rows_of_a_read).run(items, seconds, failed)

    def close(self) -> None:
        """Its threads have ended."""
        self.staging.close()

    def check(self) -> None:
        self.staging.check()


def window_rows_of_a_read(rows: int, blocks: int) -> int:
    """Of so many rows in HBM, for a load of so many blocks."""
    return min(max(1, rows // _READS_AT_A_TIME), max(_LEAST_OF_A_READ, -(-blocks // _READS_OF_A_LOAD)))


class _Windows:
    """What lies in peers' windows. Buffers are addresses."""

    def __init__(self, tier: PeerTier) -> None:
        self._tier = tier

    def read(self, places: Sequence[Place], into: Sequence[int]) -> list[Batch]:
        return self._tier.read_windows(places, into)


class PeersBelow(Below):
    """Peers, asked before each read; meanwhile other reads are under way.

    With `rows` in HBM on both sides blocks come through those, and what does not from host memory to host memory.
    """

    most_rows, rows_of_a_read = PEER_READS * PEER_READ_ROWS, PEER_READ_ROWS

    def __init__(
        self,
        make: Callable[[DramStore, HbmRows | None], PeerTier],
        dram: DramStore,
        hbm: BlockView,
        codec: Codec | None,
        rows: HbmRows | None,
    ) -> None:
        super().__init__(PEER, lambda staging: make(staging, rows), dram, hbm, codec)
        assert isinstance(self.tier, PeerTier), "peers are read by another tier"
        self._windows = _Windows(self.tier)
        self._rows = StagingRows(rows, hbm) if rows is not None and self.tier.reads_windows else None

    def load(self, items: Sequence[LoadItem], seconds: float, failed: dict[BlockKey, str]) -> int:
        if self._rows is None:
            return super().load(items, seconds, failed)
        deadline, rows = time.monotonic() + seconds, self._rows.store.capacity_blocks
        most = max(1, rows // _LOADS_AT_A_TIME)
        missed: dict[BlockKey, str] = {}
        load = LoadFromBelow(self._windows, self._rows, most, window_rows_of_a_read(rows, len(items)))
        good = load.run(items, seconds, missed)
        failed.update({key: reason for key, reason in missed.items() if reason not in _ELSEWHERE})
        rest = [item for item in items if missed.get(item.key) in _ELSEWHERE]
        return good + (super().load(rest, deadline - time.monotonic(), failed) if rest else 0)

    def close(self) -> None:
        super().close()
        if self._rows is not None:
            self._rows.close()

    def check(self) -> None:
        super().check()
        if self._rows is not None:
            self._rows.check()
