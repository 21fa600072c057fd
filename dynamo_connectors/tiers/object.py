"""G4, an S3 object store: whole chunks of blocks, written behind the engine's back, read under a hard deadline.

Objects are content-addressed, `PREFIX/NAMESPACE DIGEST/CHUNK KEY`, so replicas share them; one that another replica has
erased is a miss. A store that is slow, dead or wrong costs a request its deadline at most, and, once the circuit is
open, nothing. Bytes arrive in a buffer of the request's own and are copied out when all of them are there and proven,
and only while somebody still wants them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from dynamo_connectors.blocks import BlockKey, Namespace
from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers import object_format
from dynamo_connectors.tiers.base import Batch, Buffer, Place
from dynamo_connectors.tiers.object_client import ObjectClient
from dynamo_connectors.tiers.object_requests import ObjectRequests
from dynamo_connectors.tiers.object_upkeep import ObjectUpkeep

Outcome: TypeAlias = "Future[Sequence[StoreError | None]]"

#: No request waits for an upload, but host memory stays pinned for it.
_UPLOAD_SECONDS = 15.0
_UPLOADS_AT_ONCE = 4
#: What a store says that has kept nothing of an upload; after any other failure it may have.
_REFUSALS = ("forbidden", "no_bucket", "no_credentials")


@dataclass(frozen=True)
class ObjectSettings:
    """`url` is s3://bucket/prefix; without `endpoint_url` the AWS_* environment names the service."""

    url: str
    endpoint_url: str | None = None
    deadline_seconds: float = 1.0
    #: Rows that are pinned for uploads, waiting or running; what comes beyond it is dropped.
    upload_queue_bytes: int = 128 << 20


@dataclass(frozen=True)
class ObjectStats:
    """A snapshot. `failures` counts by reason everything that was refused, lost or found wrong."""

    read_bytes: int
    written_bytes: int
    queued_bytes: int
    circuits_opened: int
    failures: Mapping[str, int]


@dataclass
class _Upload:
    """One object on its way to the store, which may hold it because of us once it `is_sent`."""

    chunk: BlockKey
    keys: Sequence[BlockKey]
    rows: Sequence[Buffer]
    is_sent: bool = False


class ObjectStore:
    """The objects of one worker, a `LowerTier`. Calls return at once; bytes move on one thread of its own."""

    def __init__(
        self,
        settings: ObjectSettings,
        row_bytes: int,
        chunk_blocks: int,
        namespace: Namespace,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.row_bytes = row_bytes
        self.chunk_blocks = chunk_blocks
        self.object_bytes = object_format.object_bytes(row_bytes, chunk_blocks)
        self.deadline_seconds = settings.deadline_seconds
        # One object always fits: a block may be larger than a queue that suits the others.
        self._max_queued_bytes = max(settings.upload_queue_bytes, self.object_bytes)
        self._namespace = namespace.digest
        client = ObjectClient(settings.url, settings.endpoint_url, namespace.digest.hex())
        self._requests = ObjectRequests(client, clock)
        self._upkeep = ObjectUpkeep(self._requests, self.object_bytes)
        self._upload_places = asyncio.Semaphore(_UPLOADS_AT_ONCE)
        self._lock = threading.Lock()
        self._queued_bytes = 0
        self._read_bytes = 0
        self._written_bytes = 0

    def read(self, places: Sequence[Place], into: Sequence[Buffer]) -> list[Batch]:
        """Fills `into[i]` with the block at `places[i]`: one ranged request per object, all of its rows or none.

        Each ends within `deadline_seconds`. Cancelling an outcome hangs up, and leaves its buffers alone.
        """
        wanted: dict[BlockKey, list[int]] = {}
        for at, place in enumerate(places):
            wanted.setdefault(self._object_of(place), []).append(at)
        batches: list[Batch] = []
        for chunk, positions in wanted.items():
            rows = [(places[at], into[at]) for at in positions]
            batches.append(Batch(positions, self._start(partial(self._read, chunk, rows), len(rows))))
        return batches

    def write(self, places: Sequence[Place], rows: Sequence[Buffer]) -> list[Batch]:
        """Stores all rows of one chunk, in order, as one object."""
        names = {self._object_of(place) for place in places}
        is_whole = [place.row for place in places] == list(range(self.chunk_blocks)) and len(names) == 1
        outcome: Outcome
        upload = _Upload(names.pop() if names else BlockKey(b""), [place.key for place in places], rows)
        if not is_whole:
            # A row of it was lost on the way: nobody could read the rest.
            outcome = self._refused(StoreError("not_whole", "an object is written whole or not at all"), len(places))
        elif (error := self._take_queue_space()) is not None:
            outcome = self._refused(error, len(places))
        else:
            outcome = self._start(partial(self._write, upload), len(places))
            outcome.add_done_callback(lambda _: self._give_queue_space())
        return [Batch(range(len(places)), outcome, lambda: upload.is_sent)]

    def erase(self, chunks: Sequence[BlockKey]) -> Outcome:
        """Removes objects. The outcome comes when they are gone, which takes as long as the service is dead."""
        return self._start(lambda _: self._upkeep.erase(chunks), len(chunks))

    def list_chunks(self, limit: int) -> Future[None]:
        """Looks for at most `limit` objects in the background, until the service has answered; see `take_listed`."""
        return self._upkeep.list_chunks(limit)

    def take_listed(self) -> tuple[list[BlockKey], bool]:
        """The chunks found since the last call, and whether these were the last ones."""
        return self._upkeep.take_listed() if self._requests.ended is None else ([], True)

    def forget(self) -> None:
        """The weights have changed under the namespace: nothing is read or written any more by this process."""
        self._requests.end("forgotten")

    def stats(self) -> ObjectStats:
        with self._lock:
            return ObjectStats(
                read_bytes=self._read_bytes,
                written_bytes=self._written_bytes,
                queued_bytes=self._queued_bytes,
                circuits_opened=self._requests.opened_total,
                failures=self._requests.failures(),
            )

    def close(self, deadline: float) -> bool:
        """Cancels what waits or runs, and gives thread and connections back. Idempotent."""
        return self._requests.close(deadline)

    def check(self) -> None:
        """Asserts every invariant."""
        self._requests.check()
        assert 0 <= self._queued_bytes <= self._max_queued_bytes, f"{self._queued_bytes} bytes are queued"
        assert self._queued_bytes % self.object_bytes == 0, "a part of an object is queued"

    # -- any thread --------------------------------------------------------------------------------------------------

    def _start(self, work: Callable[[Outcome], Coroutine[Any, Any, None]], blocks: int) -> Outcome:
        """Runs `work` on the loop's thread. Its outcome comes when it has ended, or when somebody cancels it before
        `work` has claimed it: from then on nothing of the caller's is touched."""
        outcome: Outcome = Future()
        try:
            task = self._requests.submit(partial(work, outcome))
        except StoreError as error:
            return self._refused(error, blocks)
        task.add_done_callback(partial(self._settle, outcome, blocks))
        outcome.add_done_callback(lambda outcome: outcome.cancelled() and task.cancel())
        return outcome

    def _settle(self, outcome: Outcome, blocks: int, task: Future[None]) -> None:
        if not _claim(outcome):
            return
        error = self._requests.cancelled() if task.cancelled() else task.exception()
        if error is None or isinstance(error, StoreError):
            outcome.set_result([error] * blocks)
        else:
            outcome.set_exception(error)

    def _object_of(self, place: Place) -> BlockKey:
        """A block that is large enough has an object of its own, named like it."""
        assert place.chunk is not None or self.chunk_blocks == 1, f"{place} names no object"
        return place.key if place.chunk is None else place.chunk

    def _refused(self, error: StoreError, blocks: int) -> Outcome:
        self._requests.count(error.reason)
        outcome: Outcome = Future()
        outcome.set_result([error] * blocks)
        return outcome

    def _take_queue_space(self) -> StoreError | None:
        if self._requests.refuses_writes():
            return StoreError("tier_off", "the object store has failed; it is asked again soon")
        with self._lock:
            if self._queued_bytes + self.object_bytes > self._max_queued_bytes:
                return StoreError("upload_backlog", "the object store is slower than what is to be stored")
            self._queued_bytes += self.object_bytes
        return None

    def _give_queue_space(self) -> None:
        with self._lock:
            self._queued_bytes -= self.object_bytes

    # -- the loop's thread -------------------------------------------------------------------------------------------

    async def _read(self, chunk: BlockKey, wanted: Sequence[tuple[Place, Buffer]], outcome: Outcome) -> None:
        stride, rows = object_format.row_stride(self.row_bytes), [place.row for place, _ in wanted]
        first, name = min(rows), object_format.object_name(chunk)
        requests = self._requests
        try:
            get = partial(requests.client.get, name, first * stride, (max(rows) + 1) * stride)
            body = await requests.request(requests.reads, get, self.deadline_seconds)
            slots = [body[(row - first) * stride : (row - first + 1) * stride] for row in rows]
            payloads = [
                object_format.payload_of(self._namespace, place.key, slot)
                for (place, _), slot in zip(wanted, slots, strict=True)
            ]
        except StoreError as error:
            requests.count(error.reason)
            raise
        except asyncio.CancelledError:
            if requests.ended is None:  # the caller's own deadline came first
                requests.count("timeout")
            raise
        if not _claim(outcome):
            return
        for (_, into), payload in zip(wanted, payloads, strict=True):
            into[:] = payload
        with self._lock:
            self._read_bytes += len(rows) * self.row_bytes

    async def _write(self, upload: _Upload, outcome: Outcome) -> None:
        requests = self._requests
        try:
            async with self._upload_places:
                if not _claim(outcome):
                    return
                send = partial(self._send, upload)
                written_bytes = await requests.request(requests.writes, send, _UPLOAD_SECONDS)
        except StoreError as error:
            requests.count(error.reason)
            raise
        with self._lock:
            self._written_bytes += written_bytes

    async def _send(self, upload: _Upload) -> int:
        """Bytes sent. One request to the circuit: that an object is not there yet says nothing about writing it."""
        requests, name = self._requests, object_format.object_name(upload.chunk)
        # Another replica's, or ours from before a restart: the name says that it is as good.
        if await requests.client.size_of(name) == self.object_bytes:
            return 0
        requests.refuse_after_end()
        body = object_format.encode(self._namespace, upload.keys, upload.rows, self.row_bytes)
        requests.refuse_after_end()
        upload.is_sent = True
        try:
            await requests.client.put(name, body)
        except StoreError as error:
            upload.is_sent = error.reason not in _REFUSALS
            raise
        return len(body)


def _claim(outcome: Outcome) -> bool:
    """False when it was cancelled; else it cannot be cancelled any more. May be asked again."""
    return not outcome.cancelled() and (outcome.running() or outcome.set_running_or_notify_cancel())
