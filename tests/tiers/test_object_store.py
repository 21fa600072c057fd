"""The object store on a real S3 service: what goes in comes out, elsewhere and later too, and nothing else does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from dynamo_connectors.errors import ConfigError, StoreError
from dynamo_connectors.tiers import object_client, object_requests, object_upkeep
from dynamo_connectors.tiers.base import Place
from dynamo_connectors.tiers.object import ObjectSettings, ObjectStore
from tests.tiers.object_stores import (
    CHUNK,
    CHUNK_BLOCKS,
    KEYS,
    MARK,
    NAMESPACE,
    ROW,
    ROWS,
    SETTINGS,
    buffers,
    close,
    ended,
    key,
    list_all,
    noise,
    object_path,
    object_store,
    places_of,
    put,
    read,
    reason,
    refusal,
    start_read,
)
from tests.tiers.s3_servers import CREDENTIALS, SECRET, Moto, moto_server


@pytest.fixture(scope="module")
def service() -> Iterator[Moto]:
    with moto_server() as moto:
        yield moto


@pytest.fixture
def moto(service: Moto, credentials: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Moto]:
    monkeypatch.setattr(object_upkeep, "_RETRY_SECONDS", 0.02)
    yield service
    service.delete_all()


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(3000):
        if true():
            return
        threading.Event().wait(0.02)
    raise AssertionError("it never came to be")


@pytest.mark.parametrize("size", [1, 7, 4095, 4096, 4097, 70_001, 1 << 20])
def test_rows_come_back_as_they_went(moto: Moto, size: int) -> None:
    rows = [noise(number, size) for number in range(CHUNK_BLOCKS)]
    with object_store(moto.url, row_bytes=size) as store:
        assert put(store, CHUNK, KEYS, rows) is None
        assert read(store) == rows
        assert moto.names() == [object_path()]
        assert store.stats().written_bytes == store.object_bytes == len(moto.get(object_path()))


def test_a_read_may_begin_and_end_in_the_middle_of_a_chunk(moto: Moto) -> None:
    with object_store(moto.url) as store:
        put(store, CHUNK, KEYS, ROWS)
        for first in range(CHUNK_BLOCKS):
            for count in range(1, CHUNK_BLOCKS - first + 1):
                assert read(store, first, count) == ROWS[first : first + count]
        into = buffers(2)
        (batch,) = store.read([Place(KEYS[3], 0, CHUNK, 3), Place(KEYS[1], 0, CHUNK, 1)], into)
        assert ended(batch.outcome) is None
        assert into == [ROWS[3], ROWS[1]], "in any order, with gaps"


def test_blocks_of_several_objects_are_read_at_once(moto: Moto) -> None:
    with object_store(moto.url) as store:
        put(store, CHUNK, KEYS, ROWS)
        other = [key(number) for number in range(10, 10 + CHUNK_BLOCKS)]
        put(store, other[-1], other, ROWS[::-1])
        into = buffers(4)
        places = [*places_of(CHUNK, KEYS[2:], 2), *places_of(other[-1], other[:1]), Place(key(7), 0, key(8), 0)]
        first, second, third = store.read(places, into)
        assert [list(batch.positions) for batch in (first, second, third)] == [[0, 1], [2], [3]]
        assert ended(first.outcome) is None
        assert ended(second.outcome) is None
        assert reason(third.outcome) == "not_found", "one that is gone costs the others nothing"
        assert into == [ROWS[2], ROWS[3], ROWS[3], *buffers(1)]


def test_rows_may_start_anywhere_in_a_buffer(moto: Moto) -> None:
    around = bytearray([MARK]) * (ROW + 8)
    with object_store(moto.url) as store:
        put(store, CHUNK, KEYS, ROWS)
        assert ended(start_read(store, [memoryview(around)[3 : 3 + ROW]], 2)) is None
    assert around[3 : 3 + ROW] == ROWS[2]
    assert set(around[:3] + around[3 + ROW :]) == {MARK}, "bytes beside the row changed"


def test_a_chunk_that_is_not_whole_is_not_written(moto: Moto) -> None:
    with object_store(moto.url) as store:
        places = places_of(CHUNK, KEYS)
        for some in ([], places[:-1], places[1:], places[::-1], [*places[:-1], places[0]], [*places, places[-1]]):
            (batch,) = store.write(some, [ROWS[place.row] for place in some])
            assert [error and error.reason for error in batch.outcome.result()] == ["not_whole"] * len(some)
        two = [*places[:2], *places_of(key(9), KEYS)[2:]]
        (batch,) = store.write(two, ROWS)
        assert reason(batch.outcome) == "not_whole", "rows of two objects"
    assert moto.names() == []


def test_another_replica_lists_and_serves_what_the_first_one_wrote(moto: Moto) -> None:
    with object_store(moto.url) as first:
        put(first, CHUNK, KEYS, ROWS)
        put(first, key(9), [key(number) for number in range(6, 10)], ROWS)
    with object_store(moto.url) as second:
        assert sorted(list_all(second)) == [CHUNK, key(9)]
        assert read(second) == ROWS


def test_what_is_stored_already_is_not_sent_again(moto: Moto) -> None:
    with object_store(moto.url) as first, object_store(moto.url) as second:
        put(first, CHUNK, KEYS, ROWS)
        assert put(second, CHUNK, KEYS, [noise(77)] * CHUNK_BLOCKS) is None
        assert second.stats().written_bytes == 0
        assert read(second) == ROWS


def test_an_object_of_another_size_is_replaced(moto: Moto) -> None:
    with object_store(moto.url) as store:
        moto.put(object_path(), b"torn")
        assert put(store, CHUNK, KEYS, ROWS) is None
        assert read(store) == ROWS


def test_listing_goes_page_by_page_up_to_its_bound(moto: Moto, monkeypatch: pytest.MonkeyPatch) -> None:
    with object_store(moto.url, row_bytes=1) as store:
        body = bytes(store.object_bytes)
        for number in range(7):
            moto.put(object_path(key(number)), body)
        monkeypatch.setattr(object_client, "PAGE", 3)
        assert list_all(store) == [key(number) for number in range(7)]
    with object_store(moto.url, row_bytes=1) as store:
        assert list_all(store, 4) == [key(number) for number in range(4)]
    with object_store(moto.url, row_bytes=1) as store:
        assert list_all(store, 6) == [key(number) for number in range(6)], "where a page ends"


def test_listing_passes_over_what_is_not_ours(moto: Moto) -> None:
    other = replace(NAMESPACE, model="other")
    with object_store(moto.url) as store:
        body = bytes(store.object_bytes)
        moto.put(object_path(), body)
        moto.put(object_path(key(5)), body[:-1])
        moto.put(object_path() + ".txt", body)
        moto.put(object_path(namespace=other), body)
        moto.put("elsewhere", body)
        assert list_all(store) == [CHUNK]
        assert store.stats().failures == {"foreign_object": 2}


def test_an_object_that_is_gone_is_a_miss_and_the_store_stays_open(moto: Moto) -> None:
    with object_store(moto.url) as store:
        for _ in range(5):
            assert refusal(store) == "not_found"
        assert store.stats().failures == {"not_found": 5}
        assert store.stats().circuits_opened == 0


def test_a_bucket_that_is_not_there_is_said_once_and_turns_the_tier_off(
    moto: Moto, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_upkeep, "_RETRY_SECONDS", 0.01)
    with object_store(moto.url, replace(SETTINGS, url="s3://no-such-bucket/kv")) as store:
        store.list_chunks(10)
        while not store.stats().circuits_opened:
            assert store.take_listed() == ([], False)
        lines = [line for line in caplog.messages if "nothing is found there until" in line]
        assert len(lines) == 1
        assert "create it or name another --kvbm-object-url" in lines[0]
        assert {refusal(store) for _ in range(2)} <= {"tier_off", "no_bucket"}
        # Reads and writes are turned off apart.
        refusals = [put(store, CHUNK, KEYS, ROWS) for _ in range(4)]
        assert [refused.reason for refused in refusals if refused is not None] == ["no_bucket"] * 3 + ["tier_off"]
        assert ended(store.erase([CHUNK])) is None, "nothing is there"


def test_credentials_that_are_refused_are_a_miss_and_never_told(moto: Moto, caplog: pytest.LogCaptureFixture) -> None:
    with object_store(moto.url) as store:
        put(store, CHUNK, KEYS, ROWS)
        with moto.refusing_everybody():
            caught = ended(start_read(store, buffers(1)))
            assert [refusal(store), refusal(store)] == ["forbidden"] * 2
            refused = put(store, key(9), KEYS, ROWS)
        assert caught is not None
        assert refused is not None
        assert (caught.reason, refused.reason) == ("forbidden", "forbidden")
        assert store.stats().failures == {"forbidden": 4}
        told = f"{caught} {refused} {store.stats()} {store!r} {vars(store)} {caplog.text}"
        assert "left alone for a while" in caplog.text
        assert SECRET not in told
        assert CREDENTIALS["AWS_ACCESS_KEY_ID"] not in told


def test_credentials_that_may_not_write_do_not_close_the_store_to_reads(moto: Moto) -> None:
    with object_store(moto.url) as store:
        put(store, CHUNK, KEYS, ROWS)
        with moto.refusing_everybody():
            for number in range(10, 16):
                put(store, key(number), KEYS, ROWS)
        assert store.stats().failures == {"forbidden": 3, "tier_off": 3}
        assert read(store) == ROWS


@pytest.mark.parametrize("position", [0, 100, 4096, 4096 + ROW // 2])
def test_a_bit_that_flipped_in_the_store_is_a_miss(moto: Moto, position: int) -> None:
    with object_store(moto.url) as store:
        put(store, CHUNK, KEYS, ROWS)
        body = moto.get(object_path())
        damaged = 2 * len(body) // CHUNK_BLOCKS + (0 if position == 100 else position)
        body[damaged] ^= 1
        moto.put(object_path(), body)
        assert read(store, 0, 2) == ROWS[:2], "the rows before it are whole"
        assert refusal(store, 1, 3) in ("bad_header", "bad_checksum")
        assert store.stats().circuits_opened == 0


def test_a_cut_object_is_a_miss(moto: Moto) -> None:
    with object_store(moto.url) as store:
        put(store, CHUNK, KEYS, ROWS)
        moto.put(object_path(), moto.get(object_path())[:-1])
        assert read(store, 0, 3) == ROWS[:3]
        assert [refusal(store) for _ in range(4)] == ["cut_body"] * 4
        assert store.stats().circuits_opened == 0


def test_an_object_of_another_chain_or_namespace_is_a_miss(moto: Moto) -> None:
    with object_store(moto.url, namespace=replace(NAMESPACE, dtype="float8")) as other:
        put(other, CHUNK, KEYS, ROWS)
        foreign = moto.get(object_path(namespace=replace(NAMESPACE, dtype="float8")))
    with object_store(moto.url) as store:
        assert refusal(store) == "not_found"
        moto.put(object_path(), foreign)
        assert refusal(store) == "wrong_namespace"
        put(store, key(8), [key(5), key(6), key(7), key(8)], ROWS)
        moto.put(object_path(), moto.get(object_path(key(8))))
        assert refusal(store) == "wrong_key"


def test_erased_objects_are_gone_when_it_is_told(moto: Moto) -> None:
    with object_store(moto.url) as store:
        for number in range(20, 24):
            put(store, key(number), KEYS, ROWS)
        assert ended(store.erase([key(20), key(99), key(22)])) is None
        assert moto.names() == [object_path(key(21)), object_path(key(23))]
        assert ended(store.erase([key(20)])) is None, "what is not there is erased"
        assert put(store, key(20), KEYS, ROWS) is None
        assert len(moto.names()) == 3
        assert store.stats().failures == {}


def test_erasing_waits_until_it_is_allowed(moto: Moto, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_requests, "_RETRY_SECONDS", 0.02)
    with object_store(moto.url) as store:
        put(store, CHUNK, KEYS, ROWS)
        with moto.refusing_everybody():
            outcome = store.erase([CHUNK])
            wait_until(lambda: store.stats().failures.get("forbidden", 0) >= 4)
            assert not outcome.done()
        assert ended(outcome) is None
        assert moto.names() == []


def test_after_a_change_of_weights_nothing_passes(moto: Moto) -> None:
    with object_store(moto.url) as store:
        put(store, CHUNK, KEYS, ROWS)
        store.forget()
        assert refusal(store) == "forgotten"
        refused = put(store, key(9), KEYS, ROWS)
        assert refused is not None
        assert refused.reason == "forgotten"
        assert reason(store.erase([CHUNK])) == "forgotten"
        with pytest.raises(StoreError, match="forgotten"):
            store.list_chunks(10)
        assert store.take_listed() == ([], True)
    assert moto.names() == [object_path()]


def test_a_closed_store_takes_and_gives_nothing(moto: Moto) -> None:
    with object_store(moto.url) as store:
        put(store, CHUNK, KEYS, ROWS)
        close(store)
        close(store)
        assert refusal(store) == "closed"
        refused = put(store, key(9), KEYS, ROWS)
        assert refused is not None
        assert refused.reason == "closed"
        assert reason(store.erase([CHUNK])) == "closed"


def test_many_threads_share_a_store(moto: Moto) -> None:
    with object_store(moto.url) as store:

        def work(number: int) -> None:
            keys = [key(10 * number + row) for row in range(CHUNK_BLOCKS)]
            rows = [noise(10 * number + row) for row in range(CHUNK_BLOCKS)]
            assert put(store, keys[-1], keys, rows) is None
            for _ in range(5):
                into = buffers(CHUNK_BLOCKS)
                (batch,) = store.read(places_of(keys[-1], keys), into)
                assert ended(batch.outcome) is None
                assert into == rows

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert store.stats().read_bytes == 8 * 5 * CHUNK_BLOCKS * ROW
        assert store.stats().queued_bytes == 0


def test_a_bucket_without_prefix_will_do(moto: Moto) -> None:
    with object_store(moto.url, replace(SETTINGS, url="s3://kvbm")) as store:
        put(store, CHUNK, KEYS, ROWS)
        assert read(store) == ROWS
        assert moto.names() == [f"{NAMESPACE.digest.hex()}/{CHUNK.hex()}"]
        assert list_all(store) == [CHUNK]


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"dynamo-connectors\[s3\]") as caught:
        ObjectStore(SETTINGS, ROW, CHUNK_BLOCKS, NAMESPACE)
    assert "\n" not in str(caught.value)


def test_a_place_or_an_environment_that_cannot_be_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> str:
        with pytest.raises(ConfigError, match="--kvbm-object-url s3://b/p") as caught:
            ObjectStore(ObjectSettings(url), ROW, CHUNK_BLOCKS, NAMESPACE)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    url = "s3://b/p//q"
    assert "empty path segment" in refused()
    url = "s3://b/p"
    monkeypatch.setenv("AWS_CHECKSUM_ALGORITHM", "perhaps")
    assert "perhaps" in refused()
