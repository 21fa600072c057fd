"""The one contract of every tier: an index that decides, a store that holds bytes under the same slot numbers.

In vLLM the scheduler owns the index and each worker owns a store; in SGLang one process owns both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError

#: Anything that exposes a writable, contiguous range of bytes.
Buffer = memoryview


class TierStore(Protocol):
    """The bytes of one tier's slots. Calls on different slots may run on different threads at the same time."""

    row_bytes: int
    capacity_blocks: int

    def write(self, slot: int, key: BlockKey, row: Buffer) -> None:
        """Keeps `row` (`row_bytes` long) in `slot`. Raises `StoreError`; the slot then holds nothing readable."""

    def read(self, slot: int, key: BlockKey, into: Buffer) -> None:
        """Fills `into` with the bytes written for `key`.

        Raises `StoreError` when `slot` does not hold `key`, or holds it damaged; `into` is then undefined.
        """

    def close(self) -> None:
        """Gives everything back. Idempotent."""


class Place(NamedTuple):
    """Where a block lies in a tier: a slot, or (object_store) row `row` of object `chunk`."""

    key: BlockKey
    slot: int
    chunk: BlockKey | None = None
    row: int = 0


def _always() -> bool:
    return True


class Batch(NamedTuple):
    """Blocks that one request moves. `outcome` says for each of `positions` why it failed, or None.

    `sent`, of a write, says once the outcome is there whether bytes of it may lie in the tier, however it ended.
    `given_up` may come first, with a reason: the blocks are a miss, though something may still touch their buffers.
    """

    positions: Sequence[int]
    outcome: Future[Sequence[StoreError | None]]
    sent: Callable[[], bool] = _always
    given_up: Future[str] | None = None


class LowerTier(Protocol):
    """A tier below host memory as the transfer engine sees it. Calls return at once; the bytes move on its threads.

    Once an outcome is there, nothing touches that batch's buffers any more; a block without an error is complete and,
    when read, proven. An outcome may never come (a device that hangs): callers of `read` keep their own deadline.
    """

    #: What a whole load may wait for this tier; what comes later is a miss.
    deadline_seconds: float

    def read(self, places: Sequence[Place], into: Sequence[Buffer]) -> list[Batch]:
        """Fills `into[i]` with the block at `places[i]`."""

    def write(self, places: Sequence[Place], rows: Sequence[Buffer]) -> list[Batch]:
        """Keeps `rows[i]` at `places[i]`; the rows must not change before the outcome."""

    def close(self, deadline: float) -> bool:
        """Cancels what has not started; waits for the rest until `deadline` (of `time.monotonic`) at most.

        False when something is still busy then. Idempotent.
        """
