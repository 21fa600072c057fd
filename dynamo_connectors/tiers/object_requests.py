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
from dynamo_connectors.tiers.object_circuit import Circuit
from dynamo_connectors.tiers.object_client import ObjectClient
from dynamo_connectors.tiers.object_loop import LoopThread

log = logging.getLogger(__name__)

T = TypeVar("T")
#: The store answered: it is alive, whatever it said about this object.
_ANSWERS = ("not_found", "cut_body")


class ObjectRequests:
    """One client, one thread for all its requests, one circuit for what reads and one for what writes.

    Apart, so that credentials that may only read do not close the store to reads.
    """

    def __init__(self, client: ObjectClient, clock: Callable[[], float]) -> None:
        self.client = client
        self.reads, self.writes = Circuit(), Circuit()
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

    def wait(self, work: Callable[[], Coroutine[Any, Any, T]], seconds: float) -> T:
        """The outcome of `work`, or `StoreError` after `seconds` at most; `work` is then cancelled."""
        late = StoreError("deadline", f"{self.client.name} did not answer in time")
        if seconds <= 0:
            raise late
        future = self.submit(work)
        try:
            return future.result(seconds)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise late from None
        except concurrent.futures.CancelledError:
            raise self.cancelled() from None

    async def request(self, circuit: Circuit, ask: Callable[[], Awaitable[T]], seconds: float) -> T:
        """One request, on the loop's thread. The circuit hears how it ended, however it ends."""
        if not circuit.allow(self._clock()):
            raise StoreError("circuit_open", f"{self.client.name} has failed; it is asked again soon")
        failure: str | None = "it does not answer in time"
        try:
            answer = await asyncio.wait_for(ask(), seconds)
            failure = None
        except StoreError as error:
            failure = None if error.reason in _ANSWERS else str(error)
            raise
        except asyncio.TimeoutError:
            raise StoreError("deadline", f"{self.client.name} did not answer in {seconds:.3g} s") from None
        finally:
            self._report(circuit, failure)
        return answer

    def refuses_writes(self) -> bool:
        """Whether a write would not set out now. From any thread."""
        return self.writes.refuses(self._clock())

    def cancelled(self) -> StoreError:
        return StoreError(self._ended or "closed", f"{self.client.name} was left before it had answered")

    def count(self, reason: str, times: int = 1) -> None:
        with self._lock:
            self._failures[reason] += times

    def failures(self) -> dict[str, int]:
        """Everything that was refused, lost or found wrong, by reason."""
        with self._lock:
            return dict(self._failures)

    def end(self, reason: str) -> None:
        """Lets nothing new pass, for `reason`."""
        with self._lock:
            self._ended = reason

    def close(self) -> None:
        """Cancels what runs, and gives thread and connections back. Idempotent."""
        self.end("closed")
        self._loop.close()
        self.client.close()

    def check(self) -> None:
        """Asserts every invariant."""
        self.reads.check()
        self.writes.check()

    def _report(self, circuit: Circuit, failure: str | None) -> None:
        if failure is None:
            circuit.succeeded()
            return
        opened = circuit.opened_total
        circuit.failed(self._clock())
        if circuit.opened_total != opened:
            log.warning("dynamo: %s is left alone for a while: %s", self.client.name, failure)
