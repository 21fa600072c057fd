"""The object store on a real S3 service: what goes in comes out, elsewhere and later too, and nothing else does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from dynamo_connectors.errors import ConfigError, StoreError
from dynamo_connectors.tiers import object_client, object_upkeep
from dynamo_connectors.tiers.object import ObjectSettings, ObjectStore, RowRead
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
    key,
    list_all,
    noise,
    object_path,
    object_store,
    put,
    read,
    refusal,
)
from tests.tiers.s3_servers import CREDENTIALS, SECRET, Moto, moto_server


@pytest.fixture(scope="module")
def service() -> Iterator[Moto]:
    with moto_server() as moto:
        yield moto


@pytest.fixture
def moto(service: Moto, monkeypatch: pytest.MonkeyPatch) -> Iterator[Moto]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
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
        store.read_rows(CHUNK, [RowRead(3, KEYS[3], into[0]), RowRead(1, KEYS[1], into[1])])
        assert into == [ROWS[3], ROWS[1]], "in any order, with gaps"


def test_rows_may_start_anywhere_in_a_buffer(moto: Moto) -> None:
    around = bytearray([MARK]) * (ROW + 8)
    with object_store(moto.url) as store:
        put(store, CHUNK, KEYS, ROWS)
        store.read_rows(CHUNK, [RowRead(2, KEYS[2], memoryview(around)[3 : 3 + ROW])])
    assert around[3 : 3 + ROW] == ROWS[2]
    assert set(around[:3] + around[3 + ROW :]) == {MARK}, "bytes beside the row changed"


def test_the_rows_are_copied_before_the_call_returns(moto: Moto) -> None:
    slab = [memoryview(bytearray(row)) for row in ROWS]
    stored = threading.Event()
    with object_store(moto.url) as store:
        store.put_chunk(CHUNK, KEYS, slab, lambda error: stored.set())
        for row in slab:
            row[:] = bytes(ROW)
        assert stored.wait(60)
        assert read(store) == ROWS


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
            assert refusal(lambda: read(store)) == "not_found"
        assert store.stats().failures == {"not_found": 5}
        assert store.stats().circuits_opened == 0


def test_credentials_that_are_refused_are_a_miss_and_never_told(moto: Moto, caplog: pytest.LogCaptureFixture) -> None:
    with object_store(moto.url) as store:
        put(store, CHUNK, KEYS, ROWS)
        into = buffers(1)
        with moto.refusing_everybody():
            with pytest.raises(StoreError, match="forbidden") as caught:
                store.read_rows(CHUNK, [RowRead(0, KEYS[0], into[0])])
            assert refusal(lambda: read(store)) == "forbidden"
            assert refusal(lambda: read(store)) == "forbidden"
            refused = put(store, key(9), KEYS, ROWS)
            assert refused is not None
            assert refused.reason == "forbidden"
        assert into == buffers(1)
        assert store.stats().failures == {"forbidden": 4}
        told = f"{caught.value} {refused} {store.stats()} {store!r} {vars(store)} {caplog.text}"
        assert "left alone for a while" in caplog.text
        assert SECRET not in told
        assert CREDENTIALS["AWS_ACCESS_KEY_ID"] not in told


def test_credentials_that_may_not_write_do_not_close_the_store_to_reads(moto: Moto) -> None:
    with object_store(moto.url) as store:
        put(store, CHUNK, KEYS, ROWS)
        with moto.refusing_everybody():
            for number in range(10, 16):
                put(store, key(number), KEYS, ROWS)
        assert store.stats().failures == {"forbidden": 3, "circuit_open": 3}
        assert read(store) == ROWS


@pytest.mark.parametrize("position", [0, 100, 4096, 4096 + ROW // 2])
def test_a_bit_that_flipped_in_the_store_is_a_miss_and_the_object_goes(moto: Moto, position: int) -> None:
    with object_store(moto.url) as store:
        put(store, CHUNK, KEYS, ROWS)
        body = moto.get(object_path())
        damaged = 2 * len(body) // CHUNK_BLOCKS + (0 if position == 100 else position)
        body[damaged] ^= 1
        moto.put(object_path(), body)
        assert read(store, 0, 2) == ROWS[:2], "the rows before it are whole"
        assert refusal(lambda: read(store, 1, 3)) in ("bad_header", "bad_checksum")
        wait_until(lambda: moto.names() == [])
        assert refusal(lambda: read(store)) == "not_found"


def test_a_cut_object_is_a_miss_and_goes(moto: Moto) -> None:
    with object_store(moto.url) as store:
        put(store, CHUNK, KEYS, ROWS)
        moto.put(object_path(), moto.get(object_path())[:-1])
        assert read(store, 0, 3) == ROWS[:3]
        assert refusal(lambda: read(store)) == "cut_body"
        wait_until(lambda: moto.names() == [])
        assert store.stats().circuits_opened == 0


def test_an_object_of_another_chain_or_namespace_is_a_miss(moto: Moto) -> None:
    with object_store(moto.url, namespace=replace(NAMESPACE, dtype="float8")) as other:
        put(other, CHUNK, KEYS, ROWS)
        foreign = moto.get(object_path(namespace=replace(NAMESPACE, dtype="float8")))
    with object_store(moto.url) as store:
        assert refusal(lambda: read(store)) == "not_found"
        moto.put(object_path(), foreign)
        assert refusal(lambda: read(store)) == "wrong_namespace"
        put(store, key(8), [key(5), key(6), key(7), key(8)], ROWS)
        moto.put(object_path(), moto.get(object_path(key(8))))
        assert refusal(lambda: read(store)) == "wrong_key"


def test_deleted_chunks_leave_the_store_unless_they_come_back_first(moto: Moto) -> None:
    with object_store(moto.url) as store:
        for number in range(20, 24):
            put(store, key(number), KEYS, ROWS)
        for number in (20, 21, 22):
            store.delete_chunk(key(number))
        store.delete_chunk(key(99))
        wait_until(lambda: moto.names() == [object_path(key(23))])
        assert put(store, key(21), KEYS, ROWS) is None
        wait_until(lambda: moto.names() == [object_path(key(21)), object_path(key(23))])
        assert store.stats().failures == {}


def test_deletes_that_wait_are_bounded(moto: Moto, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_upkeep, "_MAX_DELETES_WAITING", 3)
    with moto.refusing_everybody(), object_store(moto.url) as store:
        for number in range(10):
            store.delete_chunk(key(number))
        wait_until(lambda: store.stats().failures.get("delete_backlog") == 7)


def test_after_a_change_of_weights_nothing_passes(moto: Moto) -> None:
    with object_store(moto.url) as store:
        put(store, CHUNK, KEYS, ROWS)
        store.forget()
        assert refusal(lambda: read(store)) == "forgotten"
        refused = put(store, key(9), KEYS, ROWS)
        assert refused is not None
        assert refused.reason == "forgotten"
        assert refusal(lambda: store.list_chunks(10)) == "forgotten"
        assert store.take_listed() == ([], True)
        store.delete_chunk(CHUNK)
    assert moto.names() == [object_path()]


def test_a_closed_store_takes_and_gives_nothing(moto: Moto) -> None:
    with object_store(moto.url) as store:
        put(store, CHUNK, KEYS, ROWS)
        store.close()
        store.close()
        assert refusal(lambda: read(store)) == "closed"
        refused = put(store, key(9), KEYS, ROWS)
        assert refused is not None
        assert refused.reason == "closed"
        store.delete_chunk(CHUNK)


def test_many_threads_share_a_store(moto: Moto) -> None:
    with object_store(moto.url) as store:

        def work(number: int) -> None:
            keys = [key(10 * number + row) for row in range(CHUNK_BLOCKS)]
            rows = [noise(10 * number + row) for row in range(CHUNK_BLOCKS)]
            assert put(store, keys[-1], keys, rows) is None
            for _ in range(5):
                into = buffers(CHUNK_BLOCKS)
                store.read_rows(keys[-1], [RowRead(row, keys[row], into[row]) for row in range(CHUNK_BLOCKS)])
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
