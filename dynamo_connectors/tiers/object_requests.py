"""How requests reach an object store: from any thread, under a deadline, through a circuit, every failure counted."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers.circuit import Circuit
from dynamo_connectors.tiers.object_client import ObjectClient
from dynamo_connectors.tiers.object_loop import LoopThread

log = logging.getLogger(__name__)

T = TypeVar("T")
#: The store answered: it is alive, whatever it said about this object.
_ANSWERS = ("not_found", "cut_body")
_ERRORS_TO_OPEN, _RETRY_SECONDS, _MAX_RETRY_SECONDS = 3, 1.0, 60.0


class ObjectRequests:
    """One client, one thread for all its requests, one circuit for what reads and one for what writes.

    Apart, so that credentials that may only read do not close the store to reads.
    """

    def __init__(self, client: ObjectClient, clock: Callable[[], float]) -> None:
        self.client = client
        self.reads = Circuit(_ERRORS_TO_OPEN, _RETRY_SECONDS, _MAX_RETRY_SECONDS)
        self.writes = Circuit(_ERRORS_TO_OPEN, _RETRY_SECONDS, _MAX_RETRY_SECONDS)
        self.opened_total = 0
        self._clock = clock
        self._lock = threading.Lock()
        self._failures: Counter[str] = Counter()
        #: Why nothing passes any more, once it is so.
        self._ended: str | None = None
        self._loop = LoopThread("kvbm-object")

    @property
    def ended(self) -> str | None:
        return self._ended

    def submit(self, work: Callable[[], Coroutine[Any, Any, T]]) -> concurrent.futures.Future[T]:
        """Starts `work` on the loop's thread. Raises `StoreError` after the end."""
        with self._lock:
            if self._ended is not None:
                raise StoreError(self._ended, f"{self.client.name} takes no more requests")
            return self._loop.submit(work())

    async def request(self, circuit: Circuit, ask: Callable[[], Awaitable[T]], seconds: float) -> T:
        """One request, on the loop's thread. The circuit hears how it ended, however it ends."""
        self.refuse_after_end()
        if not circuit.admits(self._clock()):
            raise StoreError("tier_off", f"{self.client.name} has failed; it is asked again soon")
        failure: str | None = "it does not answer in time"
        try:
            answer = await asyncio.wait_for(ask(), seconds)
            failure = None
        except StoreError as error:
            failure = None if error.reason in _ANSWERS else str(error)
            raise
        except asyncio.TimeoutError:
            raise StoreError("timeout", f"{self.client.name} did not answer in {seconds:.3g} s") from None
        finally:
            if self._ended is None:
                self._report(circuit, failure)
        return answer

    def refuses_writes(self) -> bool:
        """Whether a write would not set out now. From any thread."""
        return self.writes.refuses(self._clock())

    def cancelled(self) -> StoreError:
        return StoreError(self._ended or "closed", f"{self.client.name} was left before it had answered")

    def refuse_after_end(self) -> None:
        """Raises `StoreError` when nothing may be sent any more."""
        if self._ended is not None:
            raise self.cancelled()

    def count(self, reason: str, times: int = 1) -> None:
        with self._lock:
            self._failures[reason] += times

    def failures(self) -> dict[str, int]:
        """Everything that was refused, lost or found wrong, by reason."""
        with self._lock:
            return dict(self._failures)

    def end(self, reason: str) -> None:
        """Cancels what runs and lets nothing new pass, for `reason`."""
        with self._lock:
            if self._ended is None:
                self._ended = reason
                self._loop.cancel_all()

    def close(self, deadline: float) -> bool:
        """Gives thread and connections back too; False when the thread is still busy. Idempotent."""
        self.end("closed")
        ended = self._loop.close(deadline)
        self.client.close()
        return ended

    def check(self) -> None:
        """Asserts every invariant."""
        self.reads.check()
        self.writes.check()

    def _report(self, circuit: Circuit, failure: str | None) -> None:
        if failure is None:
            if circuit.note_success():
                log.warning("dynamo: %s answers again", self.client.name)
        elif circuit.note_error(self._clock()):
            self.opened_total += 1
            log.warning("dynamo: %s is left alone for a while: %s", self.client.name, failure)
