"""Hybrid models: several pools, each with rows of its own, and a prefix that counts only as far as all of them go."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_connectors.errors import ConfigError, UnsupportedLayoutError
from dynamo_connectors.sglang.backend import HiCacheBackend
from dynamo_connectors.sglang.page_store import PageStore
from dynamo_connectors.sglang.pool_match import PoolNeed, match_pools
from tests.sglang.conftest import MakeBackend
from tests.sglang.host_pool import FakeHostPool


def hashes(*pages: int) -> list[str]:
    return [f"{page:064x}" for page in pages]


def transfer(name: str, keys: list[str], slots: list[int] | None = None, policy: str = "all_pages") -> SimpleNamespace:
    """SGLang's PoolTransfer, as far as we read it."""
    return SimpleNamespace(name=name, keys=keys, host_indices=slots, hit_policy=policy)


class Hybrid:
    """A backend over the pools of a hybrid model: KV, a sparse-attention indexer, Mamba states."""

    def __init__(self, make_backend: MakeBackend, **changes: object) -> None:
        self.kv = FakeHostPool(pages=16)
        self.indexer = FakeHostPool(pages=16, piece_bytes=32)
        self.mamba = FakeHostPool(pages=16, page_size=1, piece_bytes=200)
        self.backend: HiCacheBackend = make_backend(**changes)
        self.backend.register_mem_pool_host(self.kv)
        for name, pool in (("kv", self.kv), ("indexer", self.indexer), ("mamba", self.mamba)):
            self.backend.register_mem_host_pool_v2(pool, name)
        self.backend.open()

    def keep(self, pages: Sequence[int], states: Sequence[int] = ()) -> None:
        """Pages with their indexer pages, and the Mamba states that end at some of them."""
        for page in pages:
            self.kv.fill(page, b"kv %d" % page)
            self.indexer.fill(page, b"indexer %d" % page)
        for page in states:
            self.mamba.fill(page, b"state %d" % page)
        kept = self.backend.batch_set_v2(
            [
                transfer("indexer", hashes(*pages), self.indexer.slots(*pages)),
                transfer("mamba", hashes(*states), self.mamba.slots(*states), "trailing_pages"),
            ]
        )
        assert kept == {"indexer": [True] * len(pages), "mamba": [True] * len(states)}
        assert all(self.backend.batch_set_v1(hashes(*pages), self.kv.slots(*pages)))


NEEDED = [transfer("indexer", []), transfer("mamba", ["one"], policy="trailing_pages")]


def test_every_pool_gets_its_own_bytes_back(make_backend: MakeBackend) -> None:
    model = Hybrid(make_backend)
    model.keep([0, 1, 2], states=[2])
    got = model.backend.batch_get_v2(
        [
            transfer("indexer", hashes(0, 1, 2), model.indexer.slots(8, 9, 10)),
            transfer("mamba", hashes(2), model.mamba.slots(11)),
        ]
    )
    assert got == {"indexer": [True] * 3, "mamba": [True]}
    assert all(model.indexer.holds(8 + page, b"indexer %d" % page) for page in range(3))
    assert model.mamba.holds(11, b"state 2")
    assert model.backend.batch_get_v1(hashes(0, 1, 2), model.kv.slots(12, 13, 14)) == [True] * 3
    assert all(model.kv.holds(12 + page, b"kv %d" % page) for page in range(3))


def test_a_prefix_counts_as_far_as_every_pool_holds_it(make_backend: MakeBackend) -> None:
    model = Hybrid(make_backend)
    model.keep([0, 1, 2, 3, 4], states=[1, 3])
    match = model.backend.match_pools(hashes(0, 1, 2, 3, 4, 5), NEEDED)
    assert match.lengths == (2, 4), "a prefix must end where a state was kept"
    assert match.pages == 4
    assert match.reach == {"kv": 5, "indexer": 5, "mamba": 4}
    assert model.backend.match_pools(hashes(0, 1, 2), [transfer("swa", ["a", "b"], policy="trailing_pages")]).pages == 0
    assert model.backend.match_pools(hashes(0, 1, 2), [transfer("indexer", [], policy="block_groups")]).pages == 0
    assert model.backend.match_pools(hashes(0, 1, 2), None).pages == 3


def test_damage_in_a_second_pool_shortens_the_prefix(make_backend: MakeBackend, tmp_path: Path) -> None:
    model = Hybrid(make_backend)
    model.keep([0, 1, 2, 3], states=[3])
    (slab,) = [path for path in (tmp_path / "kv").glob("*.slab") if b"indexer" in path.read_bytes()]
    content = slab.read_bytes()
    with slab.open("r+b") as file:
        file.seek(content.index(b"indexer 2"))
        file.write(b"damaged")
    read = transfer("indexer", hashes(0, 1, 2, 3), model.indexer.slots(8, 9, 10, 11))
    assert model.backend.batch_get_v2([read]) == {"indexer": [True, True, False, True]}
    assert model.backend.match_pools(hashes(0, 1, 2, 3), [transfer("indexer", [])]).pages == 2
    counts = model.backend.counts("indexer")
    assert counts is not None
    assert counts.load_failures == {"bad_checksum": 1}


def test_pools_share_the_space_by_the_host_memory_they_have(make_backend: MakeBackend) -> None:
    backend = make_backend(extra_config={"kvbm_nvme_gb": 100 * 8192 / 1e9})
    main, second = FakeHostPool(pages=16), FakeHostPool(pages=16, piece_bytes=64)
    main.size, second.size = 4 * 30, 4 * 10  # type: ignore[attr-defined]
    backend.register_mem_pool_host(main)
    backend.register_mem_host_pool_v2(second, "swa")
    backend.open()
    capacities = [counts.capacity_pages for counts in (backend.counts(), backend.counts("swa")) if counts]
    assert capacities == [75, 25]


def test_a_second_pool_without_room_names_itself(make_backend: MakeBackend) -> None:
    backend = make_backend(extra_config={"kvbm_nvme_gb": 3 * 8192 / 1e9})
    main, second = FakeHostPool(pages=16), FakeHostPool(pages=1, piece_bytes=64)
    main.size, second.size = 4 * 16, 4 * 1  # type: ignore[attr-defined]
    backend.register_mem_pool_host(main)
    backend.register_mem_host_pool_v2(second, "swa")
    with pytest.raises(ConfigError, match=r"less than one page of the pool swa .* raise it"):
        backend.open()
    assert backend.batch_exists(hashes(0)) == 0


def test_a_pool_that_comes_late_is_opened_with_the_rest(make_backend: MakeBackend) -> None:
    pool, draft = FakeHostPool(pages=8), FakeHostPool(pages=8, piece_bytes=64)
    backend = make_backend(pool)
    backend.register_mem_host_pool_v2(draft, "draft")
    draft.fill(0, b"draft")
    assert backend.batch_set_v2([transfer("draft", hashes(0), draft.slots(0))]) == {"draft": [True]}
    assert backend.batch_get_v2([transfer("draft", hashes(0), draft.slots(3))]) == {"draft": [True]}
    assert draft.holds(3, b"draft")


@pytest.mark.parametrize("error", [NotImplementedError("no pages"), ValueError("layer_first")])
def test_a_pool_that_cannot_be_stored_is_refused_in_one_line(make_backend: MakeBackend, error: Exception) -> None:
    class Odd(FakeHostPool):
        def get_page_buffer_meta(self, indices: range | list[int]) -> tuple[list[int], list[int]]:
            raise error

    backend = make_backend(FakeHostPool(pages=2))
    with pytest.raises(UnsupportedLayoutError, match=r"cannot be stored .* drop --hicache-storage-backend dynamo"):
        backend.register_mem_host_pool_v2(Odd(pages=2), "mamba")


@given(
    main_pages=st.integers(0, 8),
    pools=st.lists(
        st.tuples(st.lists(st.booleans(), min_size=8, max_size=8), st.none() | st.integers(1, 4)), max_size=3
    ),
)
def test_usable_lengths_are_what_their_definition_says(
    main_pages: int, pools: list[tuple[tuple[bool, ...], int | None]]
) -> None:
    needs = [PoolNeed(str(index), present, last) for index, (present, last) in enumerate(pools)]
    expected = [
        length
        for length in range(1, main_pages + 1)
        if all(all(need.present[max(0, length - (need.last_pages or length)) : length]) for need in needs)
    ]
    match = match_pools("kv", main_pages, needs)
    assert list(match.lengths) == expected
    assert match.pages == max(expected, default=0)


def test_pools_are_closed_at_the_same_time(make_backend: MakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disks that hang do not add up."""
    hybrid = Hybrid(make_backend)
    together, close, told = threading.Barrier(3), PageStore.close, set()

    def wait_and_close(pages: PageStore, deadline: float | None = None) -> None:
        together.wait(60)
        told.add(deadline)
        close(pages, deadline)

    monkeypatch.setattr(PageStore, "close", wait_and_close)
    hybrid.backend.close()
    assert len(told) == 1
