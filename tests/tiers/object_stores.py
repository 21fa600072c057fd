"""Object stores under test: what to write, how to read it, and what an upload came to."""

from __future__ import annotations

import queue
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest

from dynamo_connectors.blocks import BlockKey, Namespace
from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers.object import ObjectSettings, ObjectStore, RowRead
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
        store.close()


def put(store: ObjectStore, chunk: BlockKey, keys: Sequence[BlockKey], rows: Sequence[memoryview]) -> StoreError | None:
    """Stores a chunk and waits; what its `done` was told."""
    ended: queue.SimpleQueue[StoreError | None] = queue.SimpleQueue()
    store.put_chunk(chunk, keys, rows, ended.put)
    return ended.get(timeout=60)


def buffers(count: int, size: int = ROW) -> list[memoryview]:
    return [memoryview(bytearray([MARK]) * size) for _ in range(count)]


def read(store: ObjectStore, first: int = 0, count: int = CHUNK_BLOCKS, chunk: BlockKey = CHUNK) -> list[memoryview]:
    into = buffers(count, store.row_bytes)
    store.read_rows(chunk, [RowRead(first + row, KEYS[first + row], into[row]) for row in range(count)])
    return into


def refusal(work: Callable[[], object]) -> str:
    """The reason of the `StoreError` that `work` raises."""
    with pytest.raises(StoreError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return caught.value.reason


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
