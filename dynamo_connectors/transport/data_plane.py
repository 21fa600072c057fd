"""The reader's READs: which are under way, from whom, and which have ended. One thread."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple, TypeAlias

import msgspec
import numpy as np

from dynamo_connectors.errors import ConfigError, StoreError
from dynamo_connectors.head_map import Piece
from dynamo_connectors.transport.agent import (
    Agent,
    Devices,
    GpuMemoryError,
    Numbers,
    Region,
    TransferEndedError,
    TransferUnknownError,
)
from dynamo_connectors.transport.landing import WORD_BYTES, Landing
from dynamo_connectors.transport.messages import Welcome, WindowPlace

log = logging.getLogger(__name__)

#: NIXL that does not start again is tried again after so long, and ever more seldom.
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
#: Whoever is read over TCP may die in UCX when the reader's agent ends under the READ (seen with bare agents of NIXL
#: 1.5.1). READs take milliseconds; what takes longer waits for a peer that stands still, and ends with the agent.
_LAST_READS_SECONDS = 1.5

#: Addresses here and there, and bytes.
Pieces: TypeAlias = tuple[Sequence[int] | Numbers, Sequence[int] | Numbers, Sequence[int] | Numbers]


class _Known(NamedTuple):
    agent: str
    welcome: Welcome


class _Transfer(NamedTuple):
    #: None: NIXL has failed over it, and it never ends by itself.
    handle: Any
    agent: str
    #: Of words, where they come to.
    words: Numbers | None = None


class Ended(NamedTuple):
    """A READ that is over, with None or a reason. `words`: what it was to read, if it was words."""

    read: int
    why: str | None
    words: Sequence[int] = ()


class DataPlane:
    """One agent at a time. READs go into `regions`: whole rows of `row_bytes`, or `parts` of a peer's such rows."""

    def __init__(self, name: str, regions: list[Region], row_bytes: int, parts: Sequence[Piece] = ()) -> None:
        self._name = name
        self._regions = regions
        self._row_bytes = row_bytes
        self._parts = np.asarray(parts or [Piece(0, 0, row_bytes)], dtype=np.int64)
        self._runs = count(1)
        self._agent: Agent | None = None
        self._peers: dict[str, _Known] = {}
        self._landing = Landing(regions, int(self._parts[:, 1:].sum(axis=1).max()))
        self._transfers: dict[int, _Transfer] = {}
        self._pause = _FIRST_PAUSE_SECONDS
        self._retry_at = 0.0
        #: NIXL's own telemetry since somebody took it, by (what, label).
        self.counts: Counter[tuple[str, str]] = Counter()
        self._start()

    @property
    def transfers_under_way(self) -> int:
        return len(self._transfers)

    def connect(self, peer: str, welcome: Welcome) -> str | None:
        """None, or why this peer cannot be read."""
        if self._agent is None:
            self._try_to_start()
        if self._agent is None:
            return "NIXL could not be started again"
        try:
            self._peers[peer] = _Known(self._agent.connect(welcome.metadata), welcome)
        except StoreError as error:
            return str(error)
        return None

    def disconnect(self, peer: str) -> None:
        known = self._peers.pop(peer, None)
        if (
            known is None
            or self._agent is None
            or any(transfer.agent == known.agent for transfer in self._transfers.values())
        ):
            return
        self._agent.forget(known.agent)

    def post(
        self, read: int, peer: str, local: Sequence[int], slots: Sequence[int], in_window: bool = False
    ) -> str | None:
        """Starts a READ; None, or why nothing of it will arrive. `in_window`: of slots of the peer's window."""
        known = self._peers.get(peer)
        if known is None or self._agent is None:
            return "unavailable"
        window = known.welcome.window if in_window else None
        welcome = known.welcome if window is None else msgspec.structs.replace(known.welcome, base=window.base)
        pieces = self._pieces(welcome, local, slots)
        if pieces is None:
            return "internal_error"
        return self._start_read(read, known.agent, pieces, (None, None) if window is None else self._devices(window))

    def post_words(
        self, read: int, peer: str, local: Sequence[int], slots: Sequence[int], in_window: bool = False
    ) -> str | None:
        """As `post`, of the words of these slots: `run`, and then theirs. The rows at `local` are the READ's still."""
        known = self._peers.get(peer)
        if known is None or self._agent is None or (place := known.welcome.words) is None:
            return "unavailable"
        words = self._landing.places(local)
        there = (place.window if in_window else place.slots) + WORD_BYTES * np.asarray(slots, dtype=np.int64)
        lengths = np.full(len(words), WORD_BYTES)
        pieces = _joined(self._landing.addresses(words), np.concatenate(([place.run], there)), lengths)
        return self._start_read(read, known.agent, pieces, (None, None), words)

    def _start_read(
        self, read: int, agent: str, pieces: Pieces, devices: Devices, words: Numbers | None = None
    ) -> str | None:
        assert self._agent is not None, "READs are started without an agent"
        try:
            handle = self._agent.post(agent, *pieces, devices)
        except TransferEndedError as error:
            return error.reason
        except TransferUnknownError as error:
            log.warning("dynamo: a READ from %s failed in a way that may still end (%s)", agent, error)
            handle = None
        self._transfers[read] = _Transfer(handle, agent, words)
        return None

    def poll(self) -> list[Ended]:
        """READs that are over."""
        ended: list[Ended] = []
        for read, transfer in list(self._transfers.items()):
            if transfer.handle is None or self._agent is None:
                continue
            try:
                if not self._agent.is_done(transfer.handle):
                    continue
                ended.append(Ended(read, None, () if transfer.words is None else self._landing.words(transfer.words)))
            except TransferEndedError as error:
                ended.append(Ended(read, error.reason))
            except TransferUnknownError as error:
                log.warning("dynamo: a READ failed in a way that may still end (%s)", error)
                self._transfers[read] = transfer._replace(handle=None)
                continue
            del self._transfers[read]
            self._end(transfer)
        return ended

    def _end(self, transfer: _Transfer) -> None:
        assert self._agent is not None, "a READ ends without an agent"
        if transfer.words is None:
            self._measure(transfer.handle)
        try:
            self._agent.release(transfer.handle)
        except Exception as error:  # noqa: BLE001 - it has ended all the same; what is lost is a handle
            log.warning("dynamo: NIXL does not let go of a READ that is over (%s)", error)

    def _measure(self, handle: Any) -> None:
        measured = self._agent.measured(handle) if self._agent is not None else None
        if measured is not None:
            self.counts["nixl_transferred_bytes", ""] += measured.num_bytes
            self.counts["nixl_descriptors", ""] += measured.descriptors
            self.counts["nixl_post_microseconds", ""] += measured.post_microseconds
            self.counts["nixl_transfer_microseconds", ""] += measured.microseconds

    def restart(self) -> None:
        """Every READ is over, and every peer a stranger."""
        self._stop()
        self._pause, self._retry_at = _FIRST_PAUSE_SECONDS, 0.0
        self._try_to_start()

    def close(self) -> None:
        last = time.monotonic() + _LAST_READS_SECONDS
        while self._transfers and time.monotonic() < last:
            self.poll()
            time.sleep(0.001)
        self._stop()

    def check(self) -> None:
        """Asserts every invariant."""
        assert self._agent is not None or not self._transfers, "READs are under way without an agent"

    def _pieces(self, welcome: Welcome, local: Sequence[int], slots: Sequence[int]) -> Pieces | None:
        """What a READ is made of. None for what no region of ours holds."""
        of_theirs, of_ours, lengths = self._parts.T
        reach = int((of_ours + lengths).max())
        rows = np.asarray(local, dtype=np.int64)
        held = [region.holds(rows, reach) for region in self._regions]
        if not np.logical_or.reduce(held).all():
            return None
        here = np.add.outer(rows, of_ours).ravel()
        there = np.add.outer(welcome.base + np.asarray(slots, dtype=np.int64) * self._row_bytes, of_theirs).ravel()
        return _joined(here, there, np.tile(lengths, len(rows)))

    def _devices(self, theirs: WindowPlace) -> Devices:
        ours = next((region.device for region in self._regions if region.device is not None), None)
        return ours, None if theirs.device < 0 else theirs.device

    def _start(self) -> None:
        self._agent = Agent(f"{self._name}-{next(self._runs)}", [*self._regions, self._landing.region])

    def _try_to_start(self) -> None:
        """Not in a loop: other peers' answers, and the engine's questions, wait meanwhile."""
        if time.monotonic() < self._retry_at:
            return
        try:
            self._start()
        except (ConfigError, GpuMemoryError) as error:
            self._retry_at = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
            log.warning("dynamo: NIXL does not start again (%s)", error)

    def _stop(self) -> None:
        self._transfers.clear()
        self._peers.clear()
        if self._agent is not None:
            self._agent.close()
            self._agent = None


def _joined(here: Numbers, there: Numbers, lengths: Numbers) -> Pieces:
    """Neighbours on both sides are one piece."""
    starts = np.ones(len(here), bool)
    starts[1:] = (here[1:] - here[:-1] != lengths[:-1]) | (there[1:] - there[:-1] != lengths[:-1])
    return here[starts], there[starts], np.add.reduceat(lengths, starts.nonzero()[0])
