"""The object store below the disk: chunks go down after their second use, and come back into SGLang's pages."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest

from dynamo_connectors.block_manager import Move
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.sglang.backend import HiCacheBackend
from dynamo_connectors.sglang.chains import UNKNOWN
from dynamo_connectors.sglang.object_tier import ObjectTier, Offloaded
from dynamo_connectors.sglang.page_store import PageCounts, PageStore
from soak.object_store import BreakablePipe
from tests.sglang.conftest import storage_config
from tests.sglang.host_pool import FakeHostPool
from tests.tiers.s3_servers import BUCKET, CREDENTIALS, Moto, moto_server

#: Of pages this small, a chunk holds the most blocks there are.
CHUNK = 32
#: SGLang's is 128 pages.
BATCH = 16
Start = Callable[..., tuple[HiCacheBackend, FakeHostPool]]


def hashes(first: int, count: int) -> list[str]:
    return [f"{page:064x}" for page in range(first, first + count)]


def behind(first: int) -> SimpleNamespace:
    """SGLang's extra_info for pages from `first` on."""
    return SimpleNamespace(prefix_keys=hashes(0, first))


@pytest.fixture(scope="module")
def service() -> Iterator[Moto]:
    with moto_server() as moto:
        yield moto


@pytest.fixture
def start(service: Moto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    service.delete_all()
    started: list[HiCacheBackend] = []

    def start_one(
        name: str = "kv", url: str = service.url, deadline_ms: int = 20_000
    ) -> tuple[HiCacheBackend, FakeHostPool]:
        extra = {
            "kvbm_object_url": f"s3://{BUCKET}/team",
            "kvbm_object_endpoint_url": url,
            "kvbm_object_gb": 0.01,
            "kvbm_object_deadline_ms": deadline_ms,
        }
        pool = FakeHostPool(pages=128)
        (tmp_path / name).mkdir(exist_ok=True)
        backend = HiCacheBackend(storage_config(tmp_path / name, extra_config=extra))
        started.append(backend)
        backend.register_mem_pool_host(pool)
        backend.open()
        return backend, pool

    yield start_one
    for backend in started:
        backend.check()
        backend.close()


def keep(backend: HiCacheBackend, pool: FakeHostPool, count: int) -> None:
    """A request looks up, computes and keeps; a second one looks up again."""
    look_up(backend, "first", count)
    for page in range(count):
        pool.fill(page, b"page %d" % page)
    assert all(backend.batch_set_v1(hashes(0, count), pool.slots(*range(count)), behind(0)))
    assert look_up(backend, "second", count) == count


def look_up(backend: HiCacheBackend, request: str, count: int) -> int:
    """As SGLang does: in batches, then what it asked for as a whole."""
    found = sum(
        backend.batch_exists(hashes(first, min(BATCH, count - first)), behind(first))
        for first in range(0, count, BATCH)
    )
    backend.note_use(request, hashes(0, count), [])
    return found


def lower_counts(backend: HiCacheBackend) -> PageCounts:
    pages = backend._set_of_pools.pages("kv")
    assert pages is not None
    return pages.lower_counts()["object_store"]


def wait_for(what: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(600):
        if what():
            return
        pause.wait(0.05)
    pytest.fail("it did not come")


def test_chunks_go_down_and_come_back_without_the_disk(start: Start, service: Moto, tmp_path: Path) -> None:
    backend, pool = start()
    keep(backend, pool, 2 * CHUNK + 5)
    wait_for(lambda: lower_counts(backend).written_pages == 2 * CHUNK)
    assert len(service.names()) == 2
    backend.close()
    shutil.rmtree(tmp_path / "kv")
    again, pool = start()
    wait_for(lambda: lower_counts(again).recovered_pages == 2 * CHUNK)
    assert again.batch_exists(hashes(0, 70), behind(0)) == 2 * CHUNK
    # SGLang asks for what its own levels lack, wherever that begins.
    first = 7
    count = 2 * CHUNK - first
    assert again.batch_exists(hashes(first, 60), behind(first)) == count
    found = again.batch_get_v1(hashes(first, count), pool.slots(*range(first, 2 * CHUNK)), behind(first))
    assert all(found)
    assert all(pool.holds(page, b"page %d" % page) for page in range(first, 2 * CHUNK))
    assert lower_counts(again).read_pages == count


def test_a_chain_that_nobody_can_tell_is_a_counted_miss_and_never_goes_down(start: Start, service: Moto) -> None:
    backend, pool = start()
    gap = SimpleNamespace(prefix_keys=[UNKNOWN])
    slots = pool.slots(*range(CHUNK))
    # What a decode worker writes says nothing of the pages before it: the disk keeps it.
    assert all(backend.batch_set_v1(hashes(7, CHUNK), slots, SimpleNamespace(prefix_keys=None)))
    assert backend.batch_exists(hashes(7, CHUNK), gap) == 0
    assert not any(backend.batch_get_v1(hashes(7, CHUNK), slots, gap))
    for request in ("first", "second"):
        backend.note_use(request, hashes(7, CHUNK), [UNKNOWN])
    counts = backend.counts()
    assert counts is not None
    assert counts.load_failures == {"chain_unknown": CHUNK}
    assert all(backend.batch_get_v1(hashes(7, CHUNK), slots, behind(7)))
    backend.close()
    assert not service.names()


def test_a_prompt_of_several_batches_is_used_once(start: Start, service: Moto) -> None:
    backend, pool = start()
    for page in range(2 * CHUNK):
        pool.fill(page, b"page %d" % page)
    assert all(backend.batch_set_v1(hashes(0, 2 * CHUNK), pool.slots(*range(2 * CHUNK)), behind(0)))
    backend.batch_exists(hashes(0, CHUNK), behind(0))
    backend.batch_exists(hashes(CHUNK, CHUNK), behind(CHUNK))
    pages = backend._set_of_pools.pages("kv")
    assert isinstance(pages, PageStore)
    assert pages._manager.moves_in_flight == 0
    assert not pages._manager.has_moves_waiting
    look_up(backend, "second", 2 * CHUNK)
    wait_for(lambda: lower_counts(backend).written_pages == 2 * CHUNK)
    assert len(service.names()) == 2


def test_another_replica_reads_what_this_one_wrote(start: Start) -> None:
    backend, pool = start()
    keep(backend, pool, CHUNK)
    wait_for(lambda: lower_counts(backend).written_pages == CHUNK)
    replica, pool = start("another disk")
    wait_for(lambda: replica.batch_exists(hashes(0, CHUNK), behind(0)) == CHUNK)
    assert all(replica.batch_get_v1(hashes(0, CHUNK), pool.slots(*range(CHUNK)), behind(0)))
    assert pool.holds(CHUNK - 1, b"page %d" % (CHUNK - 1))


def test_a_damaged_object_is_a_miss_and_goes(start: Start, service: Moto, tmp_path: Path) -> None:
    backend, pool = start()
    keep(backend, pool, CHUNK)
    wait_for(lambda: lower_counts(backend).written_pages == CHUNK)
    backend.close()
    shutil.rmtree(tmp_path / "kv")
    (name,) = service.names()
    body = service.get(name)
    body[4096 + 10] ^= 1
    service.put(name, body)
    again, pool = start()
    wait_for(lambda: again.batch_exists(hashes(0, CHUNK), behind(0)) == CHUNK)
    assert not any(again.batch_get_v1(hashes(0, CHUNK), pool.slots(*range(CHUNK)), behind(0)))
    counts = again.counts()
    assert counts is not None
    assert counts.load_failures == {"bad_checksum": CHUNK}
    wait_for(lambda: not service.names())
    assert again.batch_exists(hashes(0, CHUNK), behind(0)) == 0


def test_a_dead_store_costs_nothing_but_its_pages(start: Start) -> None:
    backend, pool = start(url="http://127.0.0.1:9")
    keep(backend, pool, CHUNK)
    wait_for(lambda: bool((backend.counts() or pytest.fail("closed")).dropped))
    found = backend.batch_get_v1(hashes(0, CHUNK), pool.slots(*range(64, 64 + CHUNK)), behind(0))
    assert all(found), "the disk has them"
    assert pool.holds(64, b"page 0")
    assert lower_counts(backend).store_failures


def test_a_store_that_hangs_is_left_at_its_deadline_and_counted(start: Start, service: Moto) -> None:
    backend, pool = start()
    keep(backend, pool, CHUNK)
    wait_for(lambda: lower_counts(backend).written_pages == CHUNK)
    pipe = BreakablePipe(int(service.url.rsplit(":", 1)[1]))
    try:
        replica, pool = start("another disk", pipe.url, deadline_ms=300)
        wait_for(lambda: lower_counts(replica).recovered_pages == CHUNK)
        pipe.mode = "hang"
        assert not any(replica.batch_get_v1(hashes(0, CHUNK), pool.slots(*range(CHUNK)), behind(0)))
        counts = replica.counts()
        assert counts is not None
        assert counts.load_failures == {"timeout": CHUNK}
        assert lower_counts(replica).store_failures == {"timeout": 1}
        replica.close()
    finally:
        pipe.mode = "fine"
        pipe.close()


def test_changed_weights_leave_the_object_store_alone(start: Start, service: Moto) -> None:
    backend, pool = start()
    keep(backend, pool, CHUNK)
    wait_for(lambda: lower_counts(backend).written_pages == CHUNK)
    backend.suspend()
    backend.resume()
    assert backend.batch_exists(hashes(0, CHUNK), behind(0)) == 0
    for page in range(64):
        pool.fill(page, b"other weights %d" % page)
    backend.batch_set_v1(hashes(0, 64), pool.slots(*range(64)), behind(0))
    for request in ("third", "fourth", "fifth"):
        look_up(backend, request, 64)
    backend.close()
    assert len(service.names()) == 1


def test_a_second_pool_is_refused_with_the_remedy(start: Start) -> None:
    backend, _ = start()
    backend.register_mem_host_pool_v2(FakeHostPool(pages=2), "mamba")
    with pytest.raises(ConfigError, match=r"--kvbm-object-url does not work yet .* drop it"):
        backend.open()


def test_an_error_that_nobody_foresaw_ends_the_way_down_too() -> None:
    class Store:
        chunk_blocks, row_bytes = 2, 8

        def list_chunks(self, limit: int) -> Future[None]:
            return Future()

        def close(self, deadline: float) -> bool:
            return True

        def check(self) -> None:
            pass

    class Disk:
        row_bytes = 8

        def read(self, slot: int, key: BlockKey, into: memoryview) -> None:
            raise MemoryError

    ended: list[Offloaded] = []
    tier = ObjectTier(Store(), 4, 1)  # type: ignore[arg-type]
    tier.offload([Move(BlockKey(b"k"), "nvme_ssd", "object_store", 0, 0)], Disk(), ended.append)
    tier.close(time.monotonic() + 60)
    assert [(each.ok, each.damaged) for each in ended] == [(False, None)], "the chunk would be pinned for ever"
