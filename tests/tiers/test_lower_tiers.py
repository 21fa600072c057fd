"""What every tier below host memory promises the transfer engine, run on a disk slab and on an object store."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers.base import Batch, LowerTier, Place
from dynamo_connectors.tiers.nvme import NvmeStore
from dynamo_connectors.tiers.nvme_lanes import NvmeTier
from dynamo_connectors.tiers.object import ObjectStore
from tests.tiers.object_stores import CHUNK_BLOCKS, NAMESPACE, SETTINGS, buffers, object_store
from tests.tiers.s3_servers import Moto, moto_server

ROW = 3_001
BLOCKS = 4 * CHUNK_BLOCKS
KEYS = [BlockKey(bytes([number]) * 32) for number in range(BLOCKS)]
#: Whole chunks of consecutive slots: an ordinary write to either tier.
PLACES = [
    Place(key, slot, KEYS[slot - slot % CHUNK_BLOCKS + CHUNK_BLOCKS - 1], slot % CHUNK_BLOCKS)
    for slot, key in enumerate(KEYS)
]
ROWS = [memoryview(random.Random(number).randbytes(ROW)) for number in range(BLOCKS)]


@pytest.fixture(scope="module")
def service() -> Iterator[Moto]:
    with moto_server() as moto:
        yield moto


@pytest.fixture(params=["nvme", "object"])
def tier(request: pytest.FixtureRequest, tmp_path: Path, service: Moto, credentials: None) -> Iterator[LowerTier]:
    if request.param == "nvme":
        tier: LowerTier = NvmeTier(NvmeStore(tmp_path, BLOCKS, ROW, NAMESPACE))
        yield tier
        assert tier.close(time.monotonic() + 60)
    else:
        with object_store(service.url, SETTINGS, row_bytes=ROW) as store:
            yield store
        service.delete_all()


def errors_of(batches: Sequence[Batch], blocks: int) -> list[str | None]:
    """Why each block failed, or None; every block is in one batch."""
    reasons: dict[int, str | None] = {}
    for batch in batches:
        outcome = batch.outcome.result(timeout=60)
        assert len(outcome) == len(batch.positions)
        for at, error in zip(batch.positions, outcome, strict=True):
            assert at not in reasons, "a block is in two batches"
            assert error is None or isinstance(error, StoreError)
            reasons[at] = error and error.reason
    assert sorted(reasons) == list(range(blocks)), "a block is in no batch"
    return [reasons[at] for at in range(blocks)]


def write_all(tier: LowerTier) -> None:
    for start in range(0, BLOCKS, CHUNK_BLOCKS):
        part = slice(start, start + CHUNK_BLOCKS)
        assert errors_of(tier.write(PLACES[part], ROWS[part]), CHUNK_BLOCKS) == [None] * CHUNK_BLOCKS


@pytest.mark.parametrize(
    "wanted",
    [range(BLOCKS), range(BLOCKS - 1, -1, -1), [5], [0, 3, 4, 7, 12], range(2, 11), []],
    ids=["all", "backwards", "one", "scattered", "middle", "none"],
)
def test_bytes_come_back_as_they_went(tier: LowerTier, wanted: Sequence[int]) -> None:
    write_all(tier)
    into = buffers(len(wanted), ROW)
    assert errors_of(tier.read([PLACES[at] for at in wanted], into), len(wanted)) == [None] * len(wanted)
    assert into == [ROWS[at] for at in wanted]


@pytest.mark.parametrize("offset", [1, 3])
def test_rows_may_start_anywhere_in_a_buffer(tier: LowerTier, offset: int) -> None:
    write_all(tier)
    around = bytearray(b"\xee" * (ROW + 8))
    assert errors_of(tier.read(PLACES[1:2], [memoryview(around)[offset : offset + ROW]]), 1) == [None]
    assert around[offset : offset + ROW] == ROWS[1]
    assert set(around[:offset] + around[offset + ROW :]) == {0xEE}, "bytes beside the row changed"


def test_another_key_is_an_error_and_never_its_bytes(tier: LowerTier) -> None:
    write_all(tier)
    places = [PLACES[0]._replace(key=KEYS[1]), PLACES[5]._replace(key=BlockKey(b""))]
    for place in places:
        assert errors_of(tier.read([place], buffers(1, ROW)), 1) == ["wrong_key"]


def test_what_was_never_written_is_an_error(tier: LowerTier) -> None:
    (reason,) = errors_of(tier.read(PLACES[2:3], buffers(1, ROW)), 1)
    assert reason is not None


def test_a_cancelled_read_leaves_its_buffers_alone(tier: LowerTier) -> None:
    write_all(tier)
    into = buffers(BLOCKS, ROW)
    reads = tier.read(PLACES, into)
    given_up = [at for batch in reads if batch.outcome.cancel() for at in batch.positions]
    as_they_were = [bytes(into[at]) for at in given_up]
    again = buffers(BLOCKS, ROW)
    # On a slow machine several were given up in a row, for which an object store is left alone for a second.
    while "tier_off" in (errors := errors_of(tier.read(PLACES, again), BLOCKS)):
        time.sleep(0.1)
    assert errors == [None] * BLOCKS
    assert again == ROWS
    assert [bytes(into[at]) for at in given_up] == as_they_were
    for batch in reads:
        try:
            assert set(batch.outcome.result(timeout=60)) == {None}
        except CancelledError:
            assert set(batch.positions) <= set(given_up)


def test_many_threads_at_once(tier: LowerTier) -> None:
    write_all(tier)

    def read(turn: int) -> bool:
        wanted = random.Random(turn).sample(range(BLOCKS), 6)
        into = buffers(6, ROW)
        reasons = errors_of(tier.read([PLACES[at] for at in wanted], into), 6)
        return reasons == [None] * 6 and into == [ROWS[at] for at in wanted]

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, range(40)))


@pytest.mark.parametrize("call", ["read", "write"])
def test_a_closed_tier_answers_and_does_nothing(tier: LowerTier, call: str) -> None:
    write_all(tier)
    assert tier.close(time.monotonic() + 60)
    assert tier.close(time.monotonic() + 60), "closing twice is closing"
    act: Callable[..., list[Batch]] = getattr(tier, call)
    into = buffers(CHUNK_BLOCKS, ROW)
    for batch in act(PLACES[:CHUNK_BLOCKS], into):
        try:
            assert all(isinstance(error, StoreError) for error in batch.outcome.result(timeout=60))
        except CancelledError:
            continue
    assert into == buffers(CHUNK_BLOCKS, ROW)


def test_every_tier_says_how_long_a_load_may_wait_for_it(tier: LowerTier) -> None:
    assert tier.deadline_seconds > 0
    assert not isinstance(tier, ObjectStore) or tier.deadline_seconds == SETTINGS.deadline_seconds
