"""Object stores under test: what to write, how to read it, and what it came to."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

from dynamo_connectors.blocks import BlockKey, Namespace
from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers.base import Place
from dynamo_connectors.tiers.object import ObjectSettings, ObjectStore
from tests.tiers.s3_servers import BUCKET

ROW = 5_000
CHUNK_BLOCKS = 4
#: Long enough for any machine; a test of a fault that is waited for says less.
SETTINGS = ObjectSettings(url=f"s3://{BUCKET}/team/kv", deadline_seconds=20.0)
NAMESPACE = Namespace(
    engine="test", model="m", revision="r", dtype="bfloat16", layout_fingerprint="f", block_size_tokens=16
)
MARK = 0xEE


def key(number: int) -> BlockKey:
    return BlockKey(bytes([number]) * 32)


KEYS = [key(number) for number in range(CHUNK_BLOCKS)]
CHUNK = KEYS[-1]


def noise(seed: int, size: int = ROW) -> memoryview:
    return memoryview(random.Random(seed).randbytes(size))


ROWS = [noise(number) for number in range(CHUNK_BLOCKS)]


@contextmanager
def object_store(
    url: str, settings: ObjectSettings = SETTINGS, namespace: Namespace = NAMESPACE, row_bytes: int = ROW
) -> Iterator[ObjectStore]:
    store = ObjectStore(replace(settings, endpoint_url=url), row_bytes, CHUNK_BLOCKS, namespace)
    try:
        yield store
    finally:
        close(store)


def close(store: ObjectStore) -> None:
    assert store.close(time.monotonic() + 60), "it did not end"


def places_of(chunk: BlockKey, keys: Sequence[BlockKey], first: int = 0) -> list[Place]:
    """Consecutive rows of an object."""
    return [Place(key, 0, chunk, first + row) for row, key in enumerate(keys)]


def start_write(
    store: ObjectStore, chunk: BlockKey, keys: Sequence[BlockKey], rows: Sequence[memoryview]
) -> Future[Sequence[StoreError | None]]:
    (batch,) = store.write(places_of(chunk, keys), rows)
    assert list(batch.positions) == list(range(len(keys)))
    return batch.outcome


def start_read(store: ObjectStore, into: Sequence[memoryview], first: int = 0) -> Future[Sequence[StoreError | None]]:
    """Reads rows of `CHUNK`."""
    (batch,) = store.read(places_of(CHUNK, KEYS[first : first + len(into)], first), into)
    assert list(batch.positions) == list(range(len(into)))
    return batch.outcome


def ended(outcome: Future[Sequence[StoreError | None]]) -> StoreError | None:
    """The one error of all blocks, or None; waited for."""
    (error,) = set(outcome.result(timeout=60))
    assert error is None or "\n" not in str(error)
    return error


def reason(outcome: Future[Sequence[StoreError | None]]) -> str:
    error = ended(outcome)
    assert error is not None, "it was not refused"
    return error.reason


def put(store: ObjectStore, chunk: BlockKey, keys: Sequence[BlockKey], rows: Sequence[memoryview]) -> StoreError | None:
    """Stores a chunk, waits, and returns what it came to."""
    return ended(start_write(store, chunk, keys, rows))


def buffers(count: int, size: int = ROW) -> list[memoryview]:
    return [memoryview(bytearray([MARK]) * size) for _ in range(count)]


def read(store: ObjectStore, first: int = 0, count: int = CHUNK_BLOCKS) -> list[memoryview]:
    """Rows of `CHUNK`; raises why not."""
    into = buffers(count, store.row_bytes)
    if error := ended(start_read(store, into, first)):
        raise error
    return into


def refusal(store: ObjectStore, first: int = 0, count: int = CHUNK_BLOCKS) -> str:
    """Why rows of `CHUNK` are not read; not a byte of them is handed out."""
    into = buffers(count, store.row_bytes)
    why = reason(start_read(store, into, first))
    assert into == buffers(count, store.row_bytes), "bytes of a failed read were handed out"
    return why


def object_path(chunk: BlockKey = CHUNK, namespace: Namespace = NAMESPACE) -> str:
    return f"team/kv/{namespace.digest.hex()}/{chunk.hex()}"


def list_all(store: ObjectStore, limit: int = 1000) -> list[BlockKey]:
    """Everything the store lists, waited for."""
    store.list_chunks(limit)
    found: list[BlockKey] = []
    is_last = False
    while not is_last:
        more, is_last = store.take_listed()
        found += more
    return found
