"""SGLang leaves a gap between the prefix it names and the pages it asks about: filled, or noticed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dynamo_connectors.sglang import chains
from dynamo_connectors.sglang.backend import HiCacheBackend
from tests.sglang.conftest import MakeBackend
from tests.sglang.host_pool import FakeHostPool


def hashes(first: int, count: int) -> list[str]:
    return [f"{page:064x}" for page in range(first, first + count)]


def operation(last_hash: str | None, prefix_keys: list[str] | None) -> SimpleNamespace:
    return SimpleNamespace(last_hash=last_hash, prefix_keys=prefix_keys)


def test_the_deepest_node_is_added_once() -> None:
    cache = SimpleNamespace(tree_core=SimpleNamespace(get_hash_values=lambda node: {7: ["c", "d"], 0: []}[node]))
    assert chains.add_own_hashes(["a", "b"], cache, 7) == ["a", "b", "c", "d"]
    assert chains.add_own_hashes([], cache, 7) == ["c", "d"]
    assert chains.add_own_hashes(["a", "b", "c", "d"], cache, 7) == ["a", "b", "c", "d"], "a mended SGLang"
    assert chains.add_own_hashes([], cache, 0) == [], "the root"


def test_before_0_5_23_it_is_added_on_the_way() -> None:
    node, cache = SimpleNamespace(hash_value=["c"]), object()
    arguments, names = chains.add_last_node(cache, "request", node, [1, 2], "c", ["a", "b"])
    assert (arguments, names) == ((cache, "request", node, [1, 2], "c", ["a", "b", "c"]), {})
    root = SimpleNamespace(hash_value=None)
    assert chains.add_last_node(cache, "request", root, [1, 2], None, [])[0][-1] == []
    assert chains.add_last_node(cache, "request", node, [1, 2], "c", None)[0][-1] is None, "nobody wants it"


@pytest.mark.parametrize(
    ("last_hash", "prefix_keys", "is_whole"),
    [
        (None, [], True),
        (None, None, True),
        ("b", None, True),
        ("b", ["a", "b"], True),
        ("b", ["a"], False),
        ("b", [], False),
    ],
)
def test_a_gap_that_is_left_is_noticed(last_hash: str | None, prefix_keys: list[str] | None, is_whole: bool) -> None:
    asked = operation(last_hash, prefix_keys)
    chains.mark_gap(None, asked)
    assert chains.is_whole(asked.prefix_keys) is is_whole
    assert (asked.prefix_keys == prefix_keys) is is_whole


def test_a_request_counts_once_however_often_sglang_asks(make_backend: MakeBackend) -> None:
    noted: list[str] = []

    class Watched(HiCacheBackend):
        def _pages(self, name: str) -> SimpleNamespace:  # type: ignore[override]
            return SimpleNamespace(note_use=lambda chain: noted.append(chain[0].decode()[-1]))

    backend = make_backend(kind=Watched)
    for request in ("first", "first", "second"):
        backend.note_use(request, hashes(2, 1), hashes(1, 1))
    backend.note_use("third", hashes(2, 1), [chains.UNKNOWN])
    assert noted == ["1", "1"]


def test_without_an_object_store_a_gap_costs_nothing(make_backend: MakeBackend) -> None:
    pool = FakeHostPool(pages=4)
    backend = make_backend(pool)
    gap = SimpleNamespace(prefix_keys=[chains.UNKNOWN])
    assert backend.batch_set_v1(hashes(3, 1), pool.slots(0), gap) == [True]
    assert backend.batch_exists(hashes(3, 1), gap) == 1
    assert backend.batch_get_v1(hashes(3, 1), pool.slots(1), gap) == [True]
