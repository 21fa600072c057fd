"""SGLang's pages over our transport: the prefill worker's server and the decode worker's reader. Imports no engine."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import msgspec

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.sglang.handoff_layout import EngineLayout, pieces
from dynamo_connectors.sglang.handoff_layout import Welcome as LayoutWelcome
from dynamo_connectors.sglang.handoff_metrics import HandoffMeter
from dynamo_connectors.transport.agent import Region
from dynamo_connectors.transport.data_plane import DataPlane, Pieces
from dynamo_connectors.transport.messages import LEASE_BYTES, Ask, Check, Reply, Request, Verdict, Welcome
from dynamo_connectors.transport.peer_tier import PeerSettings, PeerTier
from dynamo_connectors.transport.reader_state import Common
from dynamo_connectors.transport.server import PeerServer, Served, ServerSettings
from dynamo_connectors.transport.tickets import Ticket

#: What a prefill worker knows of a room.
WAITING, WANTED, OFFERED, DELIVERED = "waiting", "wanted", "offered", "delivered"
#: Pages of one READ.
MOST_PAGES = 8192


def lease_of(room: int) -> bytes:
    """A room is a lease: its number names both."""
    return hashlib.blake2b(room.to_bytes(8, "big"), digest_size=LEASE_BYTES).digest()


class _EnginePages:
    """Pages of a lease are the engine's until the lease ends. Every offer counts as a filling of its slots."""

    def __init__(self) -> None:
        self._offers = 0
        self._generations: dict[int, int] = {}

    def fill(self, slots: Iterable[int]) -> None:
        self._offers += 1
        self._generations.update(dict.fromkeys(slots, self._offers))

    def holds(self, slot: int, key: BlockKey) -> bool:
        return True

    def generation_of(self, slot: int) -> int:
        return self._generations.get(slot, 0)


@dataclass
class _Room:
    wanted: bool = False
    offered: frozenset[int] = frozenset()
    #: Slots of which a reader has heard that they held: it may ask twice.
    proven: set[int] = field(default_factory=set)


class PageServer(PeerServer):
    """Serves a prefill worker's pages. The scheduler's thread opens rooms, offers, looks, and closes them."""

    def __init__(self, settings: ServerSettings, layout: EngineLayout, meter: HandoffMeter | None = None) -> None:
        self._meter = meter
        self._rooms: dict[bytes, _Room] = {}
        self._layout = layout
        self._pages = _EnginePages()
        regions = [Region(*region) for region in layout.regions()]
        served = Served(regions, 0, layout.slots, layout.row_bytes, self._pages, self._describe)
        super().__init__(settings, served)

    def open_room(self, lease: bytes) -> bool:
        """False when it is another request's, which keeps it."""
        with self._lock:
            if lease in self._rooms:
                return False
            self._rooms[lease] = _Room()
            self._owner.announce(lease, time.monotonic())
            return True

    def offer(self, lease: bytes, slots: Mapping[BlockKey, int]) -> None:
        """All of the room's pages. They stay what they are until the room is no more `OFFERED`."""
        with self._lock:
            room = self._rooms.get(lease)
            if room is not None and self._owner.why_ended(lease) is None:
                room.offered = frozenset(slots.values())
                self._pages.fill(room.offered)
                self._owner.export(lease, slots, time.monotonic())

    def look(self, lease: bytes) -> tuple[str | None, str]:
        """What has become of a room; None and why when it has failed."""
        with self._lock:
            room, why = self._rooms.get(lease), self._owner.why_ended(lease)
            if room is not None and room.offered and room.proven >= room.offered:
                return DELIVERED, ""
            if room is None or why is not None:
                return None, why or "closed"
            if room.offered:
                return OFFERED, ""
            return (WANTED if room.wanted else WAITING), ""

    def close_room(self, lease: bytes) -> None:
        """From here on its pages may be anybody's. A reader that has not had all of them hears that they are gone."""
        with self._lock:
            self._rooms.pop(lease, None)
            self._owner.revoke(lease)
            self._owner.take_ended()

    def _tell(self) -> None:
        if self._meter is not None:
            self._meter.add(self.take_counts())
            self._meter.set("nixl_open_leases", self.open_leases)

    def _heard(self, request: Request, reply: Reply | None) -> None:
        room = self._rooms.get(request.lease) if isinstance(request, (Ask, Check)) else None
        if room is None:
            return
        if isinstance(request, Ask):
            room.wanted = True
        elif isinstance(request, Check) and isinstance(reply, Verdict) and reply.held:
            room.proven.update(request.slots)

    def _describe(self, metadata: bytes) -> bytes:
        return LayoutWelcome(metadata, self._layout).encode()


class _PagePlane(DataPlane):
    """READs from one engine's pages into another's: `local` are slots, too."""

    def __init__(self, name: str, layout: EngineLayout) -> None:
        self._layout = layout
        self._theirs: dict[bytes, EngineLayout] = {}
        super().__init__(name, [Region(*region) for region in layout.regions()], layout.row_bytes)

    def connect(self, peer: str, welcome: Welcome) -> str | None:
        try:
            told = LayoutWelcome.decode(welcome.metadata)
        except StoreError as error:
            return str(error)
        if not self._layout.fits(told.layout):
            return "its pages or its metadata are of other sizes; start both engines with the same arguments"
        bare = msgspec.structs.replace(welcome, metadata=told.agent)
        why_not = super().connect(peer, bare)
        if why_not is None:
            self._theirs[bare.epoch] = told.layout
        return why_not

    def _pieces(self, welcome: Welcome, local: Sequence[int], slots: Sequence[int]) -> Pieces | None:
        return pieces(self._layout, self._theirs[welcome.epoch], local, slots)


class PageReader(PeerTier):
    """Reads prefill workers' pages into a decode worker's."""

    def __init__(self, settings: PeerSettings, layout: EngineLayout, meter: HandoffMeter | None = None) -> None:
        self._layout = layout
        self._meter = meter
        super().__init__(settings, [])

    def read_room(self, ticket: Ticket, slots: Mapping[BlockKey, int]) -> list[RoomRead]:
        """Into these slots, which are in use until every read `has_ended`."""
        keys, into = list(slots), list(slots.values())
        reads = []
        for first in range(0, len(keys), MOST_PAGES):
            part = slice(first, first + MOST_PAGES)
            call = self._begin(ticket.encode(), keys[part], into[part])
            reads.append(RoomRead(call.outcome, call.given_up))
        return reads

    def abandon(self, ticket: Ticket) -> None:
        """The request is over: the owner may have its pages back once no READ of them is under way."""
        self._submit(lambda: self._reader.abandon(ticket.lease))
        self.unwatch(ticket)

    def _tell(self) -> None:
        super()._tell()
        if self._meter is not None:
            self._meter.add(self.take_counts())
            self._meter.set("nixl_quarantined_bytes", self.quarantined_bytes)

    def _make_plane(self, name: str) -> DataPlane:
        return _PagePlane(name, self._layout)

    def _common(self, usual: Common) -> Common:
        patience = self._settings.deadline_seconds
        return usual._replace(unknown_seconds=patience, silence_seconds=patience / 2, is_patient=True)


class RoomRead:
    """A READ of a room's pages as the decode worker sees it."""

    def __init__(self, outcome: Future[Sequence[StoreError | None]], given_up: Future[str]) -> None:
        self._outcome = outcome
        self._given_up = given_up

    @property
    def has_ended(self) -> bool:
        """Nothing writes to its slots any more."""
        return self._outcome.done()

    @property
    def is_decided(self) -> bool:
        return self._outcome.done() or self._given_up.done()

    @property
    def failure(self) -> str | None:
        """Of one that is decided: None when every page is here and proven."""
        if not self._outcome.done():
            return self._given_up.result()
        return next((error.reason for error in self._outcome.result() if error is not None), None)
