"""Another process finds what an earlier one left, unless somebody said that it must not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dynamo_connectors.sglang import live
from dynamo_connectors.sglang.backend import HiCacheBackend
from dynamo_connectors.weights import unseen
from tests.sglang.conftest import MakeBackend, storage_config
from tests.sglang.host_pool import FakeHostPool


def hashes(*pages: int) -> list[str]:
    return [f"{page:064x}" for page in pages]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> live.Registry:
    fresh = live.Registry()
    monkeypatch.setattr(live, "backends", fresh)
    return fresh


def kept(make_backend: MakeBackend, **changes: object) -> tuple[HiCacheBackend, FakeHostPool]:
    pool = FakeHostPool(pages=8)
    backend = make_backend(pool, **changes)
    for page in range(3):
        pool.fill(page, b"page %d" % page)
    assert all(backend.batch_set_v1(hashes(0, 1, 2), pool.slots(0, 1, 2)))
    return backend, pool


def found_again(make_backend: MakeBackend, **changes: object) -> int:
    pool = FakeHostPool(pages=8)
    backend = make_backend(pool, **changes)
    found = backend.batch_get_v1(hashes(0, 1, 2), pool.slots(5, 6, 7))
    assert all(pool.holds(5 + page, b"page %d" % page) for page, here in enumerate(found) if here)
    return sum(found)


@pytest.mark.usefixtures("registry")
def test_the_next_backend_finds_the_pages(make_backend: MakeBackend) -> None:
    backend, _ = kept(make_backend)
    backend.close()
    assert found_again(make_backend) == 3


def test_a_process_killed_while_it_writes_leaves_only_whole_pages(make_backend: MakeBackend, tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from dynamo_connectors.sglang.backend import HiCacheBackend
        from tests.sglang.conftest import storage_config
        from tests.sglang.host_pool import FakeHostPool
        pool = FakeHostPool(pages=96)
        backend = HiCacheBackend(storage_config(Path(sys.argv[1])))
        backend.register_mem_pool_host(pool)
        backend.open()
        for page in range(96):
            pool.fill(page, b"page %d" % page)
        turn = 0
        while True:
            turn += 1
            page = turn % 96
            backend.batch_set_v1([f"{page:064x}"], pool.slots(page))
            if turn == 40:
                print("writing", flush=True)
        """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "kv")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        os.kill(child.pid, signal.SIGKILL)
    pool = FakeHostPool(pages=96)
    backend = make_backend(pool)
    found = 0
    for page in range(96):
        if backend.batch_get_v1(hashes(page), pool.slots(0)) == [True]:
            found += 1
            assert pool.holds(0, b"page %d" % page)
    assert found > 0


@pytest.mark.usefixtures("registry")
def test_another_configuration_starts_empty(make_backend: MakeBackend) -> None:
    backend, _ = kept(make_backend)
    backend.close()
    for changes in ({"model_name": "other"}, {"pp_size": 2}, {"attn_cp_size": 2}, {"tp_size": 2, "tp_rank": 1}):
        assert found_again(make_backend, **changes) == 0
    assert found_again(make_backend, dp_rank=3) == 3, "data-parallel ranks hold the same KV"


@pytest.mark.usefixtures("registry")
def test_weights_settings_and_revision_are_part_of_the_name(tmp_path: Path) -> None:
    """Every fact that the engine tells about its model keeps others away."""
    seen = set()
    for facts in ({}, {"weights": "a"}, {"weights": "b"}, {"revision": "a"}, {"model": "a"}, {"key_rules": "a"}):

        class Told(HiCacheBackend):
            def _engine_facts(self, facts: dict[str, str] = facts) -> dict[str, str]:
                return facts

        backend = Told(storage_config(tmp_path))
        backend.register_mem_pool_host(FakeHostPool(pages=2))
        backend.open()
        seen.update(path.name for path in tmp_path.glob("*.slab"))
        backend.close()
    assert len(seen) == 6


@pytest.mark.usefixtures("registry")
def test_what_nobody_could_ever_find_leaves_no_slab(tmp_path: Path) -> None:
    class Unseen(HiCacheBackend):
        def _engine_facts(self) -> dict[str, str]:
            return {"weights": unseen()}

    backend = Unseen(storage_config(tmp_path))
    backend.register_mem_pool_host(FakeHostPool(pages=2))
    backend.open()
    assert list(tmp_path.glob("**/*.slab"))
    backend.close()
    assert not list(tmp_path.glob("**/*.slab")), "every start would leave one more"


@pytest.mark.usefixtures("registry")
def test_cleared_pages_stay_away_and_later_ones_come_back(make_backend: MakeBackend) -> None:
    backend, pool = kept(make_backend)
    backend.clear()
    assert backend.batch_exists(hashes(0)) == 0
    assert backend.batch_set_v1(hashes(1), pool.slots(1)) == [True]
    backend.close()
    other = FakeHostPool(pages=2)
    again = make_backend(other)
    assert [again.exists(key) for key in hashes(0, 1, 2)] == [False, True, False]


def test_pages_of_changed_weights_never_outlive_the_backend(make_backend: MakeBackend, registry: live.Registry) -> None:
    backend, pool = kept(make_backend)
    registry.suspend_all()
    registry.resume_all()
    assert backend.batch_set_v1(hashes(0), pool.slots(0)) == [True]
    assert backend.batch_get_v1(hashes(0), pool.slots(4)) == [True]
    backend.clear()
    assert backend.batch_set_v1(hashes(0), pool.slots(0)) == [True]
    backend.close()
    # Attached again in the same process, still with weights that nobody can name.
    later, pool = kept(make_backend)
    later.close()
    registry.has_new_weights = False
    assert found_again(make_backend) == 0


def test_attached_while_weights_change_it_waits_for_a_flush(make_backend: MakeBackend, registry: live.Registry) -> None:
    registry.suspend_all()
    pool = FakeHostPool(pages=8)
    backend = make_backend(pool)
    assert backend.batch_set_v1(hashes(0), pool.slots(0)) == [False]
    registry.resume_all()
    assert backend.batch_set_v1(hashes(0), pool.slots(0)) == [True]
