"""The peer tier: other engines' blocks, read over NIXL into host rows. A reader's machine, sockets, an agent, a thread.

A `Place` names its ticket (`tickets.Ticket`, encoded) as `chunk`; its slot means nothing, because the owner tells it.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import numpy as np

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.head_map import Piece
from dynamo_connectors.tiers.base import Batch, Buffer, Place
from dynamo_connectors.transport.agent import Region
from dynamo_connectors.transport.data_plane import DataPlane
from dynamo_connectors.transport.messages import Codec, MessageError
from dynamo_connectors.transport.reader import Reader
from dynamo_connectors.transport.reader_state import (
    Common,
    Connect,
    Disconnect,
    Finish,
    Forget,
    GiveUp,
    Instruction,
    Look,
    Post,
    Restart,
    Send,
    Wanted,
)
from dynamo_connectors.transport.sockets import PeerSockets
from dynamo_connectors.transport.tickets import Ticket
from dynamo_connectors.transport.watchdog import Watchdog

log = logging.getLogger(__name__)

#: How long the thread sleeps between looks at READs under way.
_POLL_SECONDS = 0.0002
#: And when nobody waits for any of them.
_LATE_POLL_SECONDS = 0.03


@dataclass(frozen=True)
class PeerSettings:
    """`rank` is that of the owner's worker that is read."""

    rank: int
    namespace: bytes
    row_bytes: int
    secret: bytes
    deadline_seconds: float = 10.0
    #: Late READs may hold so many bytes of host rows; beyond it the data plane is made anew.
    quarantine_bytes: int = 16 << 20
    #: The same of rows that peers' windows are read into.
    window_quarantine_bytes: int = 0
    #: Of this engine.
    workers: int = 1
    #: What is read of each row of the peers, `row_bytes` long, for a row here; nothing for all of it.
    parts: Sequence[Piece] = ()
    #: Ranks of this engine that read each of those.
    readers: int = 1

    @property
    def read_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.parts) or self.row_bytes


@dataclass(eq=False)
class Call:
    """A read as its caller sees it."""

    keys: list[BlockKey]
    addresses: list[int]
    in_window: bool = False
    outcome: Future[Sequence[StoreError | None]] = field(default_factory=Future)
    started: float = field(default_factory=time.monotonic)
    given_up: Future[str] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.outcome.set_running_or_notify_cancel()

    def end(self, reason: str, why: str) -> None:
        self.outcome.set_result([StoreError(reason, why)] * len(self.keys))


class PeerTier:
    """A `LowerTier`. Nothing can be written to it. Reads go into `regions`, which outlive it."""

    def __init__(self, settings: PeerSettings, regions: Sequence[Region]) -> None:
        self.deadline_seconds = settings.deadline_seconds
        self._settings = settings
        self._regions = list(regions)
        self._codec = Codec(settings.secret)
        name = os.urandom(8)
        first, windows = int.from_bytes(os.urandom(8), "big") >> 3, settings.window_quarantine_bytes
        own = settings.namespace, settings.row_bytes, settings.quarantine_bytes
        common = self._common(Common(name, *own, first, window_quarantine_bytes=windows, readers=settings.readers))
        self._reader = Reader(common)
        self._plane = self._make_plane(f"dynamo-reader-{name.hex()}")
        try:
            self._sockets = PeerSockets(settings.secret)
        except BaseException:
            self._plane.close()
            raise
        self._numbers = count(first)
        #: What the engine's threads ask of ours.
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._calls: dict[int, Call] = {}
        #: Under `_lock`: calls that have neither ended nor been given up.
        self._awaited: set[Call] = set()
        self._lock = threading.Lock()
        self._closed = False
        #: Under `_lock`: nobody takes tasks any more.
        self._ended = False
        self._counts: Counter[tuple[str, str]] = Counter()
        self._quarantined_bytes = 0
        self._thread = threading.Thread(target=self._run, name="kvbm-peer", daemon=True)
        self._watchdog = Watchdog(common.silence_seconds, self._give_all_up)
        self._thread.start()

    @property
    def reads_windows(self) -> bool:
        """Whether NIXL has taken rows for them, too."""
        return len(self._regions) > 1

    # -- any thread --------------------------------------------------------------------------------------------------

    def read(self, places: Sequence[Place], into: Sequence[Buffer]) -> list[Batch]:
        """One batch per ticket. Cancelling an outcome changes nothing: its buffers are in use until it is there."""
        return self._read(places, [np.frombuffer(buffer, dtype=np.uint8).ctypes.data for buffer in into])

    def read_windows(self, places: Sequence[Place], into: Sequence[int]) -> list[Batch]:
        """As `read`, of blocks that lie in peers' windows, into rows at these addresses; `gone` is what does not."""
        return self._read(places, into, in_window=True)

    def _read(self, places: Sequence[Place], into: Sequence[int], in_window: bool = False) -> list[Batch]:
        by_ticket: dict[bytes, list[int]] = {}
        for at, place in enumerate(places):
            by_ticket.setdefault(bytes(place.chunk or b""), []).append(at)
        batches: list[Batch] = []
        for encoded, positions in by_ticket.items():
            keys = [places[at].key for at in positions]
            call = self._begin(encoded, keys, [into[at] for at in positions], in_window)
            batches.append(Batch(positions, call.outcome, given_up=call.given_up))
        return batches

    def write(self, places: Sequence[Place], rows: Sequence[Buffer]) -> list[Batch]:
        outcome: Future[Sequence[StoreError | None]] = Future()
        outcome.set_result([StoreError("read_only", "blocks of a peer are read, never written")] * len(places))
        return [Batch(range(len(places)), outcome)]

    def watch(self, ticket: Ticket) -> None:
        """A request will want these blocks: keeps its lease alive, and meets the peer meanwhile."""
        self._submit(lambda: self._reader.watch(self._address(ticket), ticket.lease, time.monotonic()))

    def unwatch(self, ticket: Ticket) -> None:
        """No request wants these blocks any more: the owner may have them back."""
        self._submit(lambda: self._reader.unwatch(ticket.lease, time.monotonic()))

    def isolate(self, namespace: bytes) -> None:
        """Meets only owners with this namespace from now on."""
        self._submit(lambda: self._reader.isolate(namespace))

    def take_counts(self) -> Counter[tuple[str, str]]:
        """What happened since the last call, by (what, label)."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
            return counts

    @property
    def quarantined_bytes(self) -> int:
        return self._quarantined_bytes

    def close(self, deadline: float) -> bool:
        """Ends all reads, those under way too. False when the thread is still busy at `deadline`. Idempotent."""
        self._closed = True
        self._sockets.wake()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            return False
        self._watchdog.close()
        self._sockets.close()
        return True

    def check(self) -> None:
        assert self._quarantined_bytes >= 0, "a negative number of bytes is quarantined"
        self._watchdog.check()
        with self._lock:
            assert not any(call.given_up.done() for call in self._awaited), "a call is awaited that was given up"

    def _begin(self, encoded: bytes, keys: list[BlockKey], addresses: list[int], in_window: bool = False) -> Call:
        """Starts a read, or ends it at once."""
        call = Call(keys, addresses, in_window)
        if self._watchdog.is_alarmed and not self._closed:
            call.end("unavailable", "NIXL keeps the thread that reads from peers")
        elif not self._submit(partial(self._start, encoded, call), call):
            call.end("closed", "the peer tier is closed")
        return call

    def _give_up(self, call: Call, reason: str) -> None:
        """Nobody waits for it any more; its buffers are in use all the same."""
        with self._lock:
            if call in self._awaited:
                self._awaited.remove(call)
                call.given_up.set_result(reason)

    def _give_all_up(self) -> None:
        """Our thread stands in a call of NIXL, or gets no share of this machine: nobody shall wait for it."""
        with self._lock:
            calls = list(self._awaited)
        if calls:
            log.warning("dynamo: a call of NIXL does not return; what it was to read from peers is computed here")
            self._count("nixl_stalls", "")
        for call in calls:
            self._give_up(call, "unavailable")

    def _submit(self, task: Callable[[], None], call: Call | None = None) -> bool:
        """False when it will never be done."""
        with self._lock:
            if self._ended:
                return False
            if call is not None:
                self._awaited.add(call)
            self._tasks.put(task)
        self._sockets.wake()
        return True

    def _make_plane(self, name: str) -> DataPlane:
        return DataPlane(name, self._regions, self._settings.row_bytes, self._settings.parts)

    def _common(self, usual: Common) -> Common:
        return usual

    # -- our thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            for region in self._regions:
                region.enter()
            while not self._closed:
                self._step()
        except BaseException:
            log.exception("dynamo: the peer tier has failed; this engine reads from no peer any more")
        # The fence: from here on nothing writes to anybody's buffers.
        self._plane.close()
        self._closed = True
        with self._lock:
            self._ended = True
        self._drain_tasks()
        for call in self._calls.values():
            self._leave(call)
            call.end("closed", "the peer tier is closed")
        self._calls.clear()

    def _step(self) -> None:
        self._watchdog.beat()
        now = time.monotonic()
        wait = _POLL_SECONDS if self._reader.is_reading else self._reader.next_due(now) - now
        if self._plane.transfers_under_way:
            wait = min(wait, _LATE_POLL_SECONDS)
        frames = self._sockets.receive(max(0.0, wait))
        self._drain_tasks()
        for peer, frame in frames:
            try:
                reply = self._codec.reply(frame)
            except MessageError as error:
                self._count("nixl_refused_messages", error.reason)
                continue
            self._reader.receive(peer, reply, time.monotonic())
            self._obey()
            # NIXL may have copied a READ in that call: who waits for it asks for the next one while others are copied.
            self._end_transfers()
        self._end_transfers()
        self._reader.tick(time.monotonic())
        self._obey()
        self._tell()

    def _end_transfers(self) -> None:
        while ended := self._plane.poll():
            for number, why, words in ended:
                self._reader.transfer_ended(number, why, time.monotonic(), words)
                self._obey()
        self._drain_tasks()

    def _drain_tasks(self) -> None:
        while True:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                return
            task()
            if not self._closed:
                self._obey()

    def _start(self, encoded: bytes, call: Call) -> None:
        number = next(self._numbers)
        self._calls[number] = call
        if self._closed:
            return  # ended with all others
        if call.given_up.done():
            self._finish(number, ["unavailable"] * len(call.keys))
            return
        try:
            ticket = Ticket.decode(encoded)
        except StoreError as error:
            self._finish(number, [error.reason] * len(call.keys))
            return
        deadline = call.started + self.deadline_seconds
        wanted = Wanted(ticket.lease, tuple(call.keys), call.in_window)
        self._reader.read(number, self._address(ticket), wanted, deadline, time.monotonic())

    def _address(self, ticket: Ticket) -> str:
        return ticket.address_of(self._settings.rank)

    def _obey(self) -> None:
        while instructions := self._reader.take():
            for step in instructions:
                self._do(step)

    def _do(self, step: Instruction) -> None:
        if isinstance(step, Send):
            self._sockets.send(step.peer, self._codec.encode(step.message))
        elif isinstance(step, Connect):
            error = self._plane.connect(step.peer, step.welcome)
            self._reader.connected(step.peer, step.welcome.epoch, error, time.monotonic())
        elif isinstance(step, Disconnect):
            self._plane.disconnect(step.peer)
        elif isinstance(step, (Post, Look)):
            self._post(step)
        elif isinstance(step, Finish):
            self._finish(step.read, step.reasons)
        elif isinstance(step, GiveUp):
            self._give_up(self._calls[step.read], "unreachable")
        elif isinstance(step, Forget):
            self._plane.disconnect(step.peer)
            self._sockets.drop(step.peer)
        elif isinstance(step, Restart):
            log.warning("dynamo: READs of peers that hang hold memory for too long; the NIXL agent is made anew")
            self._plane.restart()
            self._reader.restarted(time.monotonic())

    def _post(self, step: Post | Look) -> None:
        call = self._calls[step.read]
        into = [call.addresses[row] for row in step.rows]
        post = self._plane.post if isinstance(step, Post) else self._plane.post_words
        error = post(step.read, step.peer, into, step.slots, call.in_window)
        if error is not None:
            self._reader.transfer_ended(step.read, error, time.monotonic())

    def _finish(self, number: int, reasons: Sequence[str | None]) -> None:
        call = self._calls.pop(number)
        self._leave(call)
        good = sum(reason is None for reason in reasons)
        with self._lock:
            self._counts["nixl_read_bytes", ""] += good * self._settings.read_bytes
            self._counts["nixl_read_blocks", ""] += good
            self._counts["nixl_window_blocks", ""] += good * call.in_window
            self._counts["nixl_reads", ""] += 1
        call.outcome.set_result(
            [None if reason is None else StoreError(reason, "a peer's block did not arrive") for reason in reasons]
        )

    def _leave(self, call: Call) -> None:
        with self._lock:
            self._awaited.discard(call)

    def _count(self, what: str, label: str) -> None:
        with self._lock:
            self._counts[what, label] += 1

    def _tell(self) -> None:
        """What the machine has to say to the operator and the metrics."""
        for line in self._reader.complaints:
            log.warning("dynamo: %s", line)
        self._reader.complaints.clear()
        self._quarantined_bytes = self._reader.quarantined_bytes
        for counts in (self._reader.counts, self._plane.counts):
            if counts:
                with self._lock:
                    self._counts.update(counts)
                counts.clear()
