"""Peers that divide a model's KV heads among another number of ranks: each block comes from several, or part of one.

A rank of such a peer is read by a tier of its own, which says whom it expects there and which bytes of its rows it
wants. A block counts when each of them has proven its part.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.transport.agent import Region
from dynamo_connectors.transport.peer_tier import Call, PeerSettings, PeerTier
from dynamo_connectors.transport.tickets import Ticket

log = logging.getLogger(__name__)

#: A reader that has read nothing yet ends sooner.
_LEAVE_SECONDS = 10.0
#: Number of the peer's workers -> how each is read that holds a part of this worker's rows; none where nothing fits.
Divide = Callable[[int], Sequence[PeerSettings]]


class DividedPeerTier(PeerTier):
    """Reads peers with as many workers as this engine has itself, and leaves others to tiers made as they are met.

    Those read into the first region only.
    """

    def __init__(self, settings: PeerSettings, regions: Sequence[Region], divide: Divide) -> None:
        #: None: nobody is met any more.
        self._divide: Divide | None = divide
        self._others: dict[int, list[PeerTier]] = {}
        self._others_lock = threading.Lock()
        super().__init__(settings, regions)

    def watch(self, ticket: Ticket) -> None:
        readers = self._readers_of(ticket)
        if readers is None:
            super().watch(ticket)
        for reader in readers or ():
            reader.watch(ticket)

    def unwatch(self, ticket: Ticket) -> None:
        readers = self._readers_of(ticket)
        if readers is None:
            super().unwatch(ticket)
        for reader in readers or ():
            reader.unwatch(ticket)

    def isolate(self, namespace: bytes) -> None:
        super().isolate(namespace)
        with self._others_lock:
            self._divide = None
            for reader in self._all_others():
                reader.isolate(namespace)

    def take_counts(self) -> Counter[tuple[str, str]]:
        counts = super().take_counts()
        with self._others_lock:
            for reader in self._all_others():
                counts += reader.take_counts()
        return counts

    @property
    def quarantined_bytes(self) -> int:
        with self._others_lock:
            return super().quarantined_bytes + sum(reader.quarantined_bytes for reader in self._all_others())

    def close(self, deadline: float) -> bool:
        with self._others_lock:
            self._divide = None
            others = self._all_others()
        for reader in others:
            reader.close(0.0)  # all agents end at the same time
        return all([super().close(deadline), *(reader.close(deadline) for reader in others)])

    def check(self) -> None:
        super().check()
        with self._others_lock:
            for reader in self._all_others():
                reader.check()

    def _begin(self, encoded: bytes, keys: list[BlockKey], addresses: list[int], in_window: bool = False) -> Call:
        try:
            readers = self._readers_of(Ticket.decode(encoded))
        except StoreError:
            readers = None  # it is told there
        if readers is None:
            return super()._begin(encoded, keys, addresses, in_window)
        call = Call(keys, addresses, in_window)
        if in_window:
            call.end("gone", "a window is read whole")
        elif not readers:
            call.end("refused", "its engine divides the KV heads among its workers in a way that does not fit")
        else:
            _Together(call, [reader._begin(encoded, keys, addresses) for reader in readers])
        return call

    def _readers_of(self, ticket: Ticket) -> list[PeerTier] | None:
        """None for a peer that this tier reads itself."""
        workers = ticket.workers
        with self._others_lock:
            if workers in (0, self._settings.workers):
                return None
            if workers not in self._others:
                self._others[workers] = self._meet(workers)
            return self._others[workers]

    def _meet(self, workers: int) -> list[PeerTier]:
        readers: list[PeerTier] = []
        if self._divide is None:
            return readers
        try:
            for settings in self._divide(workers):
                readers.append(PeerTier(settings, self._regions[:1]))
        except Exception as error:  # noqa: BLE001 - whatever it is, what they hold is computed
            log.warning("dynamo: engines with %d workers cannot be read here: %s", workers, error)
            self._count("nixl_refused_peers", "no_agent")
            for reader in readers:
                reader.close(time.monotonic() + _LEAVE_SECONDS)
            return []
        if not readers:
            log.warning(
                "dynamo: engines with %d workers cannot be read by this one with %d: %s",
                workers,
                self._settings.workers,
                DIVISIBLE,
            )
            self._count("nixl_refused_peers", "other_parallelism")
        return readers

    def _all_others(self) -> list[PeerTier]:
        return [reader for readers in self._others.values() for reader in readers]


#: What unequal tensor parallelism needs.
DIVISIBLE = (
    "it needs plain attention whose KV heads lie one behind the other in each page (VLLM_KV_CACHE_LAYOUT=HND), divided "
    "evenly on both sides, uncompressed, in 16 or 32 bits, and weights from files; start both with the same "
    "--tensor-parallel-size"
)


class _Together:
    """A read that ends with the last of its parts, and is given up with the first."""

    def __init__(self, call: Call, parts: Sequence[Call]) -> None:
        self._call, self._parts = call, parts
        self._lock = threading.Lock()
        self._left = len(parts)
        for part in parts:
            part.given_up.add_done_callback(self._give_up)
            part.outcome.add_done_callback(self._end)

    def _give_up(self, given_up: Future[str]) -> None:
        with self._lock:
            if self._call.given_up.done():
                return
            self._call.given_up.set_result(given_up.result())

    def _end(self, _: Future[Sequence[StoreError | None]]) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        errors = zip(*(part.outcome.result() for part in self._parts), strict=True)
        self._call.outcome.set_result([next(filter(None, of_block), None) for of_block in errors])
