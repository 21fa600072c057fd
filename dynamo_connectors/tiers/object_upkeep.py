"""What an object store does in the background, whenever the service lets it: finding objects, and erasing them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers import object_client, object_format
from dynamo_connectors.tiers.circuit import Circuit
from dynamo_connectors.tiers.object_requests import ObjectRequests

log = logging.getLogger(__name__)

T = TypeVar("T")
#: Nobody waits for these requests.
_UPKEEP_SECONDS = 30.0
#: Until what failed is tried again; the circuit makes it longer.
_RETRY_SECONDS = 1.0


class ObjectUpkeep:
    """Listing and erasing for objects of `object_bytes` each."""

    def __init__(self, requests: ObjectRequests, object_bytes: int) -> None:
        self._requests = requests
        self._object_bytes = object_bytes
        self._lock = threading.Lock()
        self._listed: list[BlockKey] = []
        self._is_listed = False

    def list_chunks(self, limit: int) -> concurrent.futures.Future[None]:
        """Starts to look for objects, at most `limit`; the future tells the end."""
        task = self._requests.submit(partial(self._list, limit))
        task.add_done_callback(_report_end)
        return task

    def take_listed(self) -> tuple[list[BlockKey], bool]:
        """The chunks found since the last call, and whether these were the last ones."""
        with self._lock:
            found, self._listed = self._listed, []
            return found, self._is_listed

    async def erase(self, chunks: Sequence[BlockKey]) -> None:
        """Removes the objects, however long it takes until the service does it."""
        names = [object_format.object_name(chunk) for chunk in chunks]
        while True:
            try:
                return await self._request(self._requests.writes, partial(self._requests.client.delete, names))
            except StoreError:
                continue

    async def _list(self, limit: int) -> None:
        after: str | None = None
        is_told = False
        while limit > 0:
            try:
                page = await self._request(self._requests.reads, partial(self._requests.client.page, after))
            except StoreError as error:
                if not is_told:
                    log.error("dynamo: object_store tier: nothing is found there until this works: %s", error)
                is_told = True
                continue
            named = [(object_format.chunk_of(name), size) for name, size in page]
            found = [chunk for chunk, size in named if chunk is not None and size == self._object_bytes]
            if len(found) < len(page):
                self._requests.count("foreign_object", len(page) - len(found))
            with self._lock:
                self._listed += found[:limit]
            limit -= len(found)
            if len(page) < object_client.PAGE:
                break
            after = page[-1][0]
        with self._lock:
            self._is_listed = True

    async def _request(self, circuit: Circuit, ask: Callable[[], Awaitable[T]]) -> T:
        """A failure is counted, and has waited when it is raised: it may be tried again at once."""
        try:
            return await self._requests.request(circuit, ask, _UPKEEP_SECONDS)
        except StoreError as error:
            if error.reason != "tier_off":
                self._requests.count(error.reason)
            await asyncio.sleep(_RETRY_SECONDS)
            raise


def _report_end(task: concurrent.futures.Future[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("dynamo: the object store is not listed", exc_info=task.exception())
