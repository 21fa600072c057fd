"""G4, an S3 object store: whole chunks of blocks, written behind the engine's back, read under a hard deadline.

Objects are content-addressed, `PREFIX/NAMESPACE DIGEST/CHUNK KEY`, so replicas share them; one that another replica has
deleted is a miss. A store that is slow, dead or wrong costs a request its deadline at most, and, once the circuit is
open, nothing. Bytes arrive in a buffer of the request's own and are copied out, by the waiting thread, when all of them
are there and proven: an answer that comes late has nobody to write for.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from dynamo_connectors.blocks import BlockKey, Namespace
from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers import object_format
from dynamo_connectors.tiers.object_client import ObjectClient
from dynamo_connectors.tiers.object_requests import ObjectRequests
from dynamo_connectors.tiers.object_upkeep import ObjectUpkeep

log = logging.getLogger(__name__)

#: Called once when an upload has ended: None when the object is stored.
UploadDone = Callable[[StoreError | None], None]

#: Nobody waits for an upload.
_UPLOAD_SECONDS = 30.0
_UPLOADS_AT_ONCE = 4
#: The object is not what its name says: it goes, or every replica would stumble over it for ever.
_DAMAGE = ("cut_body", "bad_header", "wrong_namespace", "wrong_key", "wrong_length", "bad_checksum")


@dataclass(frozen=True)
class ObjectSettings:
    """`url` is s3://bucket/prefix; without `endpoint_url` the AWS_* environment names the service."""

    url: str
    endpoint_url: str | None = None
    deadline_seconds: float = 1.0
    #: Rows copied and waiting for their upload; beyond it new ones are dropped.
    upload_queue_bytes: int = 256 << 20


class RowRead(NamedTuple):
    """Row `row` of a chunk, which must be the block `key`, wanted in `into` (`row_bytes` long)."""

    row: int
    key: BlockKey
    into: memoryview


@dataclass(frozen=True)
class ObjectStats:
    """A snapshot. `failures` counts by reason everything that was refused, lost or found wrong."""

    read_bytes: int
    written_bytes: int
    queued_bytes: int
    circuits_opened: int
    failures: Mapping[str, int]


class ObjectStore:
    """The objects of one worker: every call may come from any thread, and only `read_rows` waits."""

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
        self._settings = settings
        self._namespace = namespace.digest
        self._clock = clock
        client = ObjectClient(settings.url, settings.endpoint_url, namespace.digest.hex())
        self._requests = ObjectRequests(client, clock)
        self._upkeep = ObjectUpkeep(self._requests, self.object_bytes)
        self._lock = threading.Lock()
        self._queued_bytes = 0
        self._read_bytes = 0
        self._written_bytes = 0
        self._uploads: set[concurrent.futures.Future[None]] = set()
        self._upload_places = asyncio.Semaphore(_UPLOADS_AT_ONCE)

    def read_rows(self, chunk: BlockKey, rows: Sequence[RowRead], deadline: float | None = None) -> None:
        """Fills every `into`, or none and raises `StoreError`. Returns by `deadline` (of the clock) in any case.

        Loads of one request share a deadline; without one it is the settings' own, from now.
        """
        stride = object_format.row_stride(self.row_bytes)
        first, last = min(row.row for row in rows), max(row.row for row in rows)
        seconds = self._settings.deadline_seconds if deadline is None else deadline - self._clock()
        ask = partial(self._requests.client.get, object_format.object_name(chunk), first * stride, (last + 1) * stride)
        try:
            body = self._requests.wait(partial(self._requests.request, self._requests.reads, ask, seconds), seconds)
            slots = [body[(row.row - first) * stride : (row.row - first + 1) * stride] for row in rows]
            payloads = [
                object_format.payload_of(self._namespace, row.key, slot) for row, slot in zip(rows, slots, strict=True)
            ]
        except StoreError as error:
            self._requests.count(error.reason)
            if error.reason in _DAMAGE:
                self.delete_chunk(chunk)
            raise
        for row, payload in zip(rows, payloads, strict=True):
            row.into[:] = payload
        with self._lock:
            self._read_bytes += len(rows) * self.row_bytes

    def put_chunk(
        self, chunk: BlockKey, keys: Sequence[BlockKey], rows: Sequence[memoryview], done: UploadDone
    ) -> None:
        """Copies the rows, to store them as one object later. `done` is called once, from any thread."""
        try:
            self._take_queue_space()
            try:
                body = object_format.encode(self._namespace, keys, rows, self.row_bytes)
                upload = self._requests.submit(partial(self._upload, chunk, body))
            except BaseException:
                self._give_queue_space()
                raise
        except StoreError as error:
            self._requests.count(error.reason)
            done(error)
            return
        with self._lock:
            self._uploads.add(upload)
        upload.add_done_callback(partial(self._end_upload, done))

    def delete_chunk(self, chunk: BlockKey) -> None:
        """Removes the object some time, if the store lets us."""
        self._upkeep.delete(chunk)

    def list_chunks(self, limit: int) -> None:
        """Looks for at most `limit` objects in the background, until the store has answered; see `take_listed`."""
        self._upkeep.list_chunks(limit)

    def take_listed(self) -> tuple[list[BlockKey], bool]:
        """The chunks found since the last call, and whether these were the last ones."""
        return self._upkeep.take_listed() if self._requests.ended is None else ([], True)

    def forget(self) -> None:
        """The weights have changed under the namespace: nothing is read or written any more by this process."""
        self._requests.end("forgotten")
        with self._lock:
            uploads = list(self._uploads)
        for upload in uploads:
            upload.cancel()

    def stats(self) -> ObjectStats:
        with self._lock:
            return ObjectStats(
                read_bytes=self._read_bytes,
                written_bytes=self._written_bytes,
                queued_bytes=self._queued_bytes,
                circuits_opened=self._requests.reads.opened_total + self._requests.writes.opened_total,
                failures=self._requests.failures(),
            )

    def close(self) -> None:
        """Drops what waits or runs, and gives thread and connections back. Idempotent."""
        self._requests.close()

    def check(self) -> None:
        """Asserts every invariant."""
        self._requests.check()
        self._upkeep.check()
        with self._lock:
            queued, uploads = self._queued_bytes, len(self._uploads)
        assert 0 <= queued <= self._settings.upload_queue_bytes, f"{queued} bytes are queued"
        assert uploads * self.object_bytes <= queued, "an upload for which no space is kept"

    def _take_queue_space(self) -> None:
        with self._lock:
            if self._requests.refuses_writes():
                raise StoreError("circuit_open", "the object store has failed; it is asked again soon")
            if self._queued_bytes + self.object_bytes > self._settings.upload_queue_bytes:
                raise StoreError("upload_backlog", "the object store is slower than what is to be stored")
            self._queued_bytes += self.object_bytes

    def _give_queue_space(self) -> None:
        with self._lock:
            self._queued_bytes -= self.object_bytes

    async def _upload(self, chunk: BlockKey, body: bytearray) -> None:
        requests, name = self._requests, object_format.object_name(chunk)
        try:
            async with self._upload_places:
                self._upkeep.keep(chunk)
                size = await requests.request(requests.writes, partial(requests.client.size_of, name), _UPLOAD_SECONDS)
                # Another replica's, or ours from before a restart: the name says that it is as good.
                if size == len(body):
                    return
                await requests.request(requests.writes, partial(requests.client.put, name, body), _UPLOAD_SECONDS)
        except StoreError as error:
            requests.count(error.reason)
            raise
        with self._lock:
            self._written_bytes += len(body)

    def _end_upload(self, done: UploadDone, upload: concurrent.futures.Future[None]) -> None:
        with self._lock:
            self._uploads.discard(upload)
        self._give_queue_space()
        error = self._requests.cancelled() if upload.cancelled() else upload.exception()
        if error is not None and not isinstance(error, StoreError):
            log.error("dynamo: an upload failed; its blocks are not kept", exc_info=error)
            error = StoreError("internal_error", str(error))
        done(error)
