"""SGLang's storage calls over a fake host pool with true addresses."""

from __future__ import annotations

import itertools
import logging
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from dynamo_connectors.errors import ConfigError, UnsupportedLayoutError
from dynamo_connectors.sglang import live
from dynamo_connectors.sglang.backend import HiCacheBackend
from dynamo_connectors.sglang.host_pages import layout_fingerprint, page_shape
from dynamo_connectors.sglang.metrics import StorageMeter
from dynamo_connectors.sglang.page_store import PageCounts, Transfer
from tests.sglang.conftest import MakeBackend, storage_config
from tests.sglang.host_pool import FakeHostPool


def hashes(*pages: int) -> list[str]:
    return [f"{page:064x}" for page in pages]


def values(*pages: int) -> list[bytes]:
    return [f"page {page}".encode() for page in pages]


def test_pages_leave_the_pool_and_come_back_elsewhere(make_backend: MakeBackend) -> None:
    pool = FakeHostPool(pages=32)
    backend = make_backend(pool)
    for page, value in zip((3, 1, 4), values(0, 1, 2), strict=True):
        pool.fill(page, value)
    assert backend.batch_set_v1(hashes(0, 1, 2), pool.slots(3, 1, 4)) == [True] * 3
    assert backend.batch_exists(hashes(0, 1, 2, 9)) == 3
    assert backend.exists(hashes(1)[0])
    before = pool.bytes_.copy()
    assert backend.batch_get_v1(hashes(0, 1, 2), pool.slots(20, 9, 30)) == [True] * 3
    assert all(pool.holds(page, value) for page, value in zip((20, 9, 30), values(0, 1, 2), strict=True))
    before[:, [20, 9, 30]] = pool.bytes_[:, [20, 9, 30]]
    assert (before == pool.bytes_).all(), "pages that nobody named were changed"


def test_a_full_batch_of_128_pages(make_backend: MakeBackend) -> None:
    pool = FakeHostPool(pages=256)
    backend = make_backend(pool, extra_config={"kvbm_nvme_gb": 0.002})
    for page in range(128):
        pool.fill(page, str(page).encode())
    assert all(backend.batch_set_v1(hashes(*range(128)), pool.slots(*range(128))))
    assert all(backend.batch_get_v1(hashes(*range(128)), pool.slots(*range(128, 256))))
    assert all(pool.holds(128 + page, str(page).encode()) for page in range(128))


def test_a_miss_leaves_the_page_alone(make_backend: MakeBackend) -> None:
    pool = FakeHostPool(pages=4)
    backend = make_backend(pool)
    pool.fill(2, b"mine")
    assert backend.batch_get_v1(hashes(7), pool.slots(2)) == [False]
    assert pool.holds(2, b"mine")


def test_a_damaged_page_is_a_miss_and_leaves_the_pool_alone(make_backend: MakeBackend, tmp_path: Path) -> None:
    pool = FakeHostPool(pages=8)
    backend = make_backend(pool)
    pool.fill(0, b"first")
    pool.fill(1, b"second")
    backend.batch_set_v1(hashes(0, 1), pool.slots(0, 1))
    (slab,) = (tmp_path / "kv").glob("*.slab")
    with slab.open("r+b") as file:
        file.seek(2 * 4096 + 17)
        file.write(b"\xff\xfe")
    pool.fill(4, b"mine")
    assert backend.batch_get_v1(hashes(0, 1), pool.slots(4, 5)) == [False, True]
    assert pool.holds(4, b"mine")
    assert backend.batch_exists(hashes(0)) == 0
    counts = backend.counts()
    assert counts is not None
    assert counts.load_failures == {"bad_checksum": 1}


def test_a_wrong_number_of_slots_is_refused(make_backend: MakeBackend, caplog: pytest.LogCaptureFixture) -> None:
    pool = FakeHostPool(pages=8)
    backend = make_backend(pool)
    assert backend.batch_set_v1(hashes(0, 1), pool.slots(0)) == [False, False]
    assert backend.batch_get_v1(hashes(0), pool.slots(0, 1)) == [False]
    pool.piece_bytes -= 1
    assert backend.batch_set_v1(hashes(0), pool.slots(0)) == [False]
    pool.piece_bytes += 1
    assert caplog.text.count("is refused: bad_request") == 3


def test_before_the_pool_is_known_everything_is_a_miss(make_backend: MakeBackend) -> None:
    backend = make_backend()
    assert backend.batch_exists(hashes(0)) == 0
    assert backend.batch_set_v1(hashes(0), []) == [False]
    assert backend.batch_get_v1(hashes(0), []) == [False]
    backend.clear()
    backend.close()


def test_the_copying_interface_is_refused_with_the_remedy(make_backend: MakeBackend) -> None:
    backend = make_backend()
    for call in (backend.get, backend.set, backend.batch_get, backend.batch_set):
        with pytest.raises(ConfigError, match="interface_v1"):
            call("key")


def test_a_tier_too_small_for_one_page_is_refused(make_backend: MakeBackend) -> None:
    with pytest.raises(ConfigError, match="--kvbm-nvme-gb leaves"):
        make_backend(FakeHostPool(pages=2), extra_config={"kvbm_nvme_gb": 0.000001})


def test_a_directory_that_is_a_file_is_refused(make_backend: MakeBackend, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--kvbm-nvme-path"):
        make_backend(FakeHostPool(pages=2), extra_config={"kvbm_nvme_path": str(tmp_path / "file")})


def test_small_pages_are_warned_about_once(make_backend: MakeBackend, caplog: pytest.LogCaptureFixture) -> None:
    make_backend(FakeHostPool(pages=2, page_size=1, piece_bytes=64))
    assert caplog.text.count("raise --page-size") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make_backend(FakeHostPool(pages=2, page_size=16, piece_bytes=65536))
    assert "raise --page-size" not in caplog.text


def test_a_pool_without_pages_is_refused(make_backend: MakeBackend) -> None:
    class Logical(FakeHostPool):
        def get_page_buffer_meta(self, indices: range | list[int]) -> tuple[list[int], list[int]]:
            return [], []

    with pytest.raises(UnsupportedLayoutError, match="no bytes of its own"):
        make_backend(Logical(pages=2))


def test_layouts_that_could_be_misread_differ() -> None:
    pool = FakeHostPool(pages=2)
    shape = page_shape(pool, range(pool.page_size))
    prints = {layout_fingerprint(pool, shape)}
    pool.layout = "page_first_direct"
    prints.add(layout_fingerprint(pool, shape))
    pool.layer_num = 3
    prints.add(layout_fingerprint(pool, shape))
    larger = FakeHostPool(pages=2, piece_bytes=128)
    prints.add(layout_fingerprint(larger, page_shape(larger, range(4))))
    assert len(prints) == 4


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> live.Registry:
    """The process's registry of backends, fresh: a change of weights is remembered for ever."""
    fresh = live.Registry()
    monkeypatch.setattr(live, "backends", fresh)
    return fresh


def test_a_change_of_weights_empties_the_tier(make_backend: MakeBackend, registry: live.Registry) -> None:
    pool = FakeHostPool(pages=4)
    backend = make_backend(pool)
    backend.batch_set_v1(hashes(0), pool.slots(0))
    registry.resume_all()
    assert backend.batch_exists(hashes(0)) == 1, "a flush without a change of weights keeps the tier"
    registry.suspend_all()
    assert backend.batch_exists(hashes(0)) == 0
    assert backend.batch_set_v1(hashes(0), pool.slots(0)) == [False]
    registry.resume_all()
    assert backend.batch_exists(hashes(0)) == 0
    assert backend.batch_set_v1(hashes(0), pool.slots(0)) == [True]
    backend.close()
    registry.suspend_all()


def test_registering_again_starts_anew(make_backend: MakeBackend, tmp_path: Path) -> None:
    pool = FakeHostPool(pages=4)
    backend = make_backend(pool)
    backend.batch_set_v1(hashes(0), pool.slots(0))
    backend.register_mem_pool_host(FakeHostPool(pages=4, piece_bytes=128))
    assert backend.batch_exists(hashes(0)) == 0
    assert len(list((tmp_path / "kv").glob("*.slab"))) == 2, "another shape of pages, another slab"


@pytest.fixture
def small_files() -> Iterator[None]:
    """The kernel refuses to let a file grow: what a full disk looks like to whoever allocates."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_at_the_start_is_one_clear_error(make_backend: MakeBackend) -> None:
    with pytest.raises(ConfigError, match="cannot hold"):
        make_backend(FakeHostPool(pages=2))


def test_sglang_threads_share_one_backend(make_backend: MakeBackend) -> None:
    """One thread backs up, one prefetches, the tier is too small for both: never another page's bytes."""
    pool = FakeHostPool(pages=64)
    backend = make_backend(pool, extra_config={"kvbm_nvme_gb": 13 * 8192 / 1e9})
    for page in range(32):
        pool.fill(page, str(page).encode())
    wrong: list[int] = []
    found: list[int] = []

    def back_up() -> None:
        for turn in range(150):
            first = turn * 5 % 28
            pages = range(first, first + 4)
            backend.batch_set_v1(hashes(*pages), pool.slots(*pages))

    def prefetch(target: int) -> None:
        for turn in itertools.count():
            if not any(writer.is_alive() for writer in writers):
                return
            first = turn * 7 % 28
            pages = range(first, first + 4)
            into = range(target, target + 4)
            answers = backend.batch_get_v1(hashes(*pages), pool.slots(*into))
            for page, place, answer in zip(pages, into, answers, strict=True):
                found.extend([page] if answer else [])
                if answer and not pool.holds(place, str(page).encode()):
                    wrong.append(page)

    writers = [threading.Thread(target=back_up) for _ in range(2)]
    threads = writers + [threading.Thread(target=prefetch, args=(target,)) for target in (40, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert found


def test_metrics_follow_the_totals() -> None:
    registry = CollectorRegistry()
    meter = StorageMeter(registry)
    counts = PageCounts(7, 3, 5, {"tier_busy": 2}, {"bad_checksum": 1}, 4, 16, 6, recovered_pages=8)
    meter.record("kv", counts)
    meter.record("kv", counts)
    meter.record("mamba", counts)
    meter.observe(Transfer("nvme_ssd", is_read=True, pages=2, num_bytes=512, seconds=0.02))
    meter.observe(Transfer("object_store", is_read=False, pages=2, num_bytes=1024, seconds=0.2))
    StorageMeter(registry).check()
    meter.check()

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"dynamo_kvbm_{name}", labels)

    assert value("wanted_blocks_total") == 7
    assert value("hit_blocks_total", tier="nvme_ssd") == 3
    assert value("onboarded_bytes_total", tier="nvme_ssd") == 512
    assert value("transfer_seconds_bucket", tier="nvme_ssd", what="onboard", le="0.01") == 0
    assert value("transfer_seconds_bucket", tier="nvme_ssd", what="onboard", le="0.03") == 1
    assert value("offloaded_bytes_total", tier="object_store") == 1024
    assert value("transfer_seconds_count", tier="object_store", what="offload") == 1
    assert value("offloaded_blocks_total", tier="nvme_ssd") == 5
    assert value("recovered_blocks_total", tier="nvme_ssd") == 8
    assert value("dropped_blocks_total", reason="tier_busy") == 4
    assert value("dropped_blocks_total", reason="evicted") == 12
    assert value("load_failures_total", reason="bad_checksum") == 2
    assert value("memory_utilization_percent", tier="nvme_ssd") == 25


def test_a_store_that_takes_the_place_of_another_counts_from_its_own_start() -> None:
    registry = CollectorRegistry()
    meter = StorageMeter(registry)
    for store in (1, 2):
        meter.record("kv", PageCounts(7, 3, 5, {}, {}, 4, 16, 6, store=store))
    assert registry.get_sample_value("dynamo_kvbm_hit_blocks_total", {"tier": "nvme_ssd"}) == 6


def test_a_backend_reports_when_asked_to(make_backend: MakeBackend) -> None:
    pool = FakeHostPool(pages=4)
    backend = make_backend(pool, enable_storage_metrics=True)
    assert backend.batch_set_v1(hashes(0), pool.slots(0)) == [True]
    assert backend.batch_get_v1(hashes(0), pool.slots(1)) == [True]
    assert [transfer.pages for transfer in backend.take_transfers()] == [1, 1]


def test_workers_share_the_space_and_the_directory(tmp_path: Path) -> None:
    pools = [FakeHostPool(pages=4), FakeHostPool(pages=4)]
    backends = [HiCacheBackend(storage_config(tmp_path, tp_rank=rank, tp_size=2)) for rank in (0, 1)]
    try:
        for backend, pool in zip(backends, pools, strict=True):
            backend.register_mem_pool_host(pool)
            backend.open()
        counts = [backend.counts() for backend in backends]
        assert [count.capacity_pages for count in counts if count] == [61, 61]
        pools[0].fill(0, b"rank 0")
        pools[1].fill(0, b"rank 1")
        for backend, pool in zip(backends, pools, strict=True):
            backend.batch_set_v1(hashes(0), pool.slots(0))
        for backend, pool in zip(backends, pools, strict=True):
            assert backend.batch_get_v1(hashes(0), pool.slots(2)) == [True]
        assert pools[0].holds(2, b"rank 0")
        assert pools[1].holds(2, b"rank 1")
    finally:
        for backend in backends:
            backend.close()
    assert len(list(tmp_path.glob("*.slab"))) == 2
