"""A disk that fails, fills up, hangs or goes away under SGLang's calls: misses with a reason, and nothing held back."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_connectors.sglang.backend import HiCacheBackend
from dynamo_connectors.sglang.page_store import PageCounts
from tests.sglang.conftest import MakeBackend
from tests.sglang.host_pool import FakeHostPool

FailWith = Callable[[str, "int | None"], None]


def hashes(*pages: int) -> list[str]:
    return [f"{page:064x}" for page in pages]


def filled(make_backend: MakeBackend, pages: int = 4) -> tuple[HiCacheBackend, FakeHostPool]:
    pool = FakeHostPool(pages=4 * pages)
    backend = make_backend(pool)
    for page in range(pages):
        pool.fill(page, b"page %d" % page)
    assert all(backend.batch_set_v1(hashes(*range(pages)), pool.slots(*range(pages))))
    return backend, pool


def counts_of(backend: HiCacheBackend) -> PageCounts:
    counts = backend.counts()
    assert counts is not None
    return counts


@pytest.fixture
def fail_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[FailWith]:
    """Makes the system call of that name fail with an error number; None lets it work again."""

    def fail(call: str, number: int | None) -> None:
        real = getattr(os, call)

        def failing(*arguments: Any) -> Any:
            if number is not None:
                raise OSError(number, os.strerror(number))
            return real(*arguments)

        monkeypatch.setattr(os, call, failing)

    yield fail
    monkeypatch.undo()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES], ids=["io", "full", "permission"])
def test_a_disk_that_takes_no_pages_costs_pages_only(
    make_backend: MakeBackend, fail_with: FailWith, number: int
) -> None:
    backend, pool = filled(make_backend)
    fail_with("pwritev", number)
    assert backend.batch_set_v1(hashes(7), pool.slots(0)) == [False]
    assert counts_of(backend).dropped["write_failed"] == 1
    assert backend.batch_exists(hashes(0, 1, 2, 3)) == 4
    assert backend.batch_get_v1(hashes(0), pool.slots(9)) == [True]
    assert pool.holds(9, b"page 0")


def test_a_disk_that_gives_no_pages_is_left_alone_after_a_while(make_backend: MakeBackend, fail_with: FailWith) -> None:
    backend, pool = filled(make_backend, pages=12)
    fail_with("preadv", errno.EIO)
    for page in range(12):
        assert backend.batch_get_v1(hashes(page), pool.slots(40)) == [False]
    failures = counts_of(backend).load_failures
    assert failures["read_failed"] >= 8
    assert failures["tier_off"] >= 1
    backend.check()


def test_a_directory_that_is_gone_harms_nobody(make_backend: MakeBackend, tmp_path: Path) -> None:
    backend, pool = filled(make_backend)
    shutil.rmtree(tmp_path / "kv")
    assert backend.batch_get_v1(hashes(0), pool.slots(9)) == [True]
    assert backend.batch_set_v1(hashes(8), pool.slots(0)) == [True]
    backend.close()
    assert backend.batch_exists(hashes(0)) == 0


def test_two_engines_on_one_path_keep_apart_and_both_come_back(make_backend: MakeBackend, tmp_path: Path) -> None:
    first, _ = filled(make_backend)
    second, _ = filled(make_backend, pages=2)
    assert len(list((tmp_path / "kv").glob("*.slab"))) == 2
    assert (first.batch_exists(hashes(0, 1, 2)), second.batch_exists(hashes(0, 1, 2))) == (3, 2)
    first.close()
    second.close()
    again = [make_backend(FakeHostPool(pages=4)) for _ in range(2)]
    assert [backend.batch_exists(hashes(0, 1, 2)) for backend in again] == [3, 2]


def test_a_hanging_disk_holds_up_nobody_else(make_backend: MakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lookups go on while a read hangs; a detach waits for it, and the late answer counts for nothing."""
    backend, pool = filled(make_backend)
    hanging, go_on, real = threading.Event(), threading.Event(), os.preadv

    def hang(*arguments: Any) -> int:
        hanging.set()
        assert go_on.wait(30)
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", hang)
    answers: list[list[bool]] = []
    reader = threading.Thread(target=lambda: answers.append(backend.batch_get_v1(hashes(0), pool.slots(9))))
    reader.start()
    assert hanging.wait(30)
    assert backend.batch_exists(hashes(0, 1, 2, 3)) == 4
    assert backend.batch_set_v1(hashes(8), pool.slots(0)) == [True]
    backend.suspend()
    assert backend.batch_exists(hashes(0)) == 0
    detach = threading.Thread(target=backend.close)
    detach.start()
    go_on.set()
    reader.join()
    detach.join()
    assert answers == [[False]], "what was read belongs to the old weights"
    backend.check()


def test_first_use_without_a_disk_turns_the_tier_off_with_one_line(
    make_backend: MakeBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SGLang before 0.5.23 never says that all pools are known, so the slab is made when it is first asked for."""
    (tmp_path / "file").write_text("")
    backend = make_backend(extra_config={"kvbm_nvme_path": str(tmp_path / "file")})
    pool = FakeHostPool(pages=4)
    backend.register_mem_pool_host(pool)
    for _ in range(3):
        assert backend.batch_exists(hashes(0)) == 0
        assert backend.batch_set_v1(hashes(0), pool.slots(0)) == [False]
    assert caplog.text.count("the nvme_ssd tier is off: --kvbm-nvme-path") == 1
