"""MLA: the ranks hold the same KV, one writes it, the others read the same bytes from its slab, in other processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from dynamo_connectors.blocks import BlockKey, Namespace
from dynamo_connectors.errors import StoreError, UnsupportedLayoutError
from dynamo_connectors.sglang import live
from dynamo_connectors.sglang.backend import HiCacheBackend
from dynamo_connectors.sglang.shared_slab import SharedSlabs
from dynamo_connectors.tiers.nvme import NvmeStore
from tests.sglang.conftest import storage_config
from tests.sglang.host_pool import FakeHostPool

RANKS = 3
PAGES = 24


def hashes(*pages: int) -> list[str]:
    return [f"{page:064x}" for page in pages]


def make_rank(directory: Path, rank: int, **changes: Any) -> tuple[HiCacheBackend, FakeHostPool]:
    facts = {"tp_rank": rank, "tp_size": RANKS, "is_mla_model": True, **changes}
    pool = FakeHostPool(pages=2 * PAGES)
    backend = HiCacheBackend(storage_config(directory, **facts))
    backend.register_mem_pool_host(pool)
    backend.open()
    return backend, pool


def serve_rank(directory: Path, rank: int, pipe: Connection) -> None:
    """A tensor-parallel rank in a process of its own: writes or reads pages as it is told."""
    backend, pool = make_rank(directory, rank)
    for what, first, count in iter(pipe.recv, None):
        pages = range(first, first + count)
        if what == "write":
            for page in pages:
                pool.fill(page, b"page %d" % page)
            pipe.send(sum(backend.batch_set_v1(hashes(*pages), pool.slots(*pages))))
        elif what == "match":
            pipe.send(backend.batch_exists(hashes(*pages)))
        elif what == "clear":
            pipe.send(backend.clear())
        else:
            into = [PAGES + page for page in pages]
            found = backend.batch_get_v1(hashes(*pages), pool.slots(*into))
            is_right = all(
                pool.holds(place, b"page %d" % page)
                for page, place, here in zip(pages, into, found, strict=True)
                if here
            )
            pipe.send((sum(found), is_right))
    backend.check()
    backend.close()


class Rank:
    def __init__(self, directory: Path, rank: int) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve_rank, args=(directory, rank, theirs))
        self.process.start()
        theirs.close()

    def ask(self, what: str, first: int = 0, count: int = 0) -> Any:
        self._pipe.send((what, first, count))
        assert self._pipe.poll(30), f"a rank does not answer {what}"
        return self._pipe.recv()

    def stop(self) -> None:
        if self.process.is_alive():
            self._pipe.send(None)
        self.process.join(30)
        self._pipe.close()
        self.process.close()


@contextmanager
def three_ranks(directory: Path) -> Iterator[list[Rank]]:
    ranks = [Rank(directory, rank) for rank in range(RANKS)]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.stop()


def test_what_one_rank_writes_every_rank_reads(tmp_path: Path) -> None:
    with three_ranks(tmp_path) as ranks:
        assert ranks[1].ask("match", 0, 4) == 0
        assert ranks[1].ask("write", 0, 4) == 0, "only rank 0 writes"
        assert ranks[0].ask("write", 0, 8) == 8
        # SGLang takes the least of what the ranks report.
        assert [rank.ask("match", 0, 10) for rank in ranks] == [8, 8, 8]
        assert [rank.ask("read", 0, 8) for rank in ranks] == [(8, True)] * RANKS
        assert ranks[0].ask("write", 8, 8) == 8
        assert [rank.ask("read", 0, 16) for rank in ranks] == [(16, True)] * RANKS
        ranks[0].ask("clear")
        assert [rank.ask("match", 0, 10) for rank in ranks] == [0, 0, 0]
        assert ranks[0].ask("write", 4, 2) == 2
        assert [rank.ask("read", 4, 2) for rank in ranks] == [(2, True)] * RANKS
    assert len(list(tmp_path.glob("*.slab"))) == 1, "one slab for all ranks"


def test_readers_survive_the_death_of_the_writer_and_find_the_next_one(tmp_path: Path) -> None:
    with three_ranks(tmp_path) as ranks:
        ranks[0].ask("write", 0, 8)
        assert ranks[2].ask("match", 0, 8) == 8
        ranks[0].process.kill()
        ranks[0].process.join()
        assert ranks[2].ask("read", 0, 8) == (8, True), "the bytes are still there, and proven"
        ranks[0].stop()
        ranks[0] = Rank(tmp_path, 0)
        assert ranks[0].ask("match", 0, 8) == 8
        ranks[0].ask("write", 8, 4)
        assert ranks[2].ask("read", 0, 12) == (12, True)


def test_a_slot_used_again_under_a_reader_is_a_miss(tmp_path: Path) -> None:
    namespace = Namespace("sglang", "tiny", "", "bf16", "layout", 16)
    store = NvmeStore(tmp_path, 4, 512, namespace)
    reader = SharedSlabs(tmp_path, namespace, 512)
    try:
        old, new = BlockKey(b"old"), BlockKey(b"new")
        store.write(2, old, memoryview(bytes(range(256)) * 2))
        assert reader.match([old, new]) == [True, False]
        store.write(2, new, memoryview(b"n" * 512))
        into = memoryview(bytearray(512))
        with pytest.raises(StoreError, match="wrong_key"):
            reader.read(0, old, into)
        assert reader.match([old, new]) == [False, True]
        reader.read(0, new, into)
        assert bytes(into) == b"n" * 512
        store.forget()
        assert reader.match([new]) == [False]
        with pytest.raises(StoreError, match="no_slot"):
            reader.read(0, new, into)
        reader.check()
    finally:
        reader.close()
        store.close()


@pytest.mark.parametrize("cut", [1, 20, 40])
def test_a_log_cut_anywhere_costs_pages_only(tmp_path: Path, cut: int) -> None:
    namespace = Namespace("sglang", "tiny", "", "bf16", "layout", 16)
    store = NvmeStore(tmp_path, 8, 512, namespace)
    keys = [BlockKey(b"key %d" % number) for number in range(4)]
    for slot, key in enumerate(keys):
        store.write(slot, key, memoryview(bytes(key) * 103)[:512])
    (log,) = tmp_path.glob("*.log")
    os.truncate(log, log.stat().st_size - cut)
    reader = SharedSlabs(tmp_path, namespace, 512)
    try:
        found = reader.match(keys)
        assert found[0]
        assert not found[3]
        reader.check()
    finally:
        reader.close()
        store.close()


def test_another_configuration_is_never_read(tmp_path: Path) -> None:
    writer, pool = make_rank(tmp_path, 0)
    pool.fill(0, b"mine")
    writer.batch_set_v1(hashes(0), pool.slots(0))
    reader, _ = make_rank(tmp_path, 1, model_name="another model")
    same, _ = make_rank(tmp_path, 1)
    assert reader.batch_exists(hashes(0)) == 0
    assert same.batch_exists(hashes(0)) == 1
    for backend in (writer, reader, same):
        backend.close()


def test_new_weights_end_the_sharing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another engine's slab may hold what is now another model's KV under the same name: the reader stays away."""
    monkeypatch.setattr(live, "backends", live.Registry())
    writer, pool = make_rank(tmp_path, 0)
    writer.batch_set_v1(hashes(0), pool.slots(0))
    reader, _ = make_rank(tmp_path, 1)
    other_engine, _ = make_rank(tmp_path, 0)
    other_engine.batch_set_v1(hashes(1), pool.slots(1))
    assert reader.batch_exists(hashes(0)) == reader.batch_exists(hashes(1)) == 1
    reader.suspend()
    reader.resume()
    assert reader.batch_exists(hashes(0)) == reader.batch_exists(hashes(1)) == 0
    for backend in (writer, reader, other_engine):
        backend.close()


def test_a_state_that_each_rank_owns_is_not_shared(tmp_path: Path) -> None:
    ranks = [make_rank(tmp_path, rank) for rank in (0, 1)]
    for rank, (backend, _) in enumerate(ranks):
        states = FakeHostPool(pages=8, page_size=1, piece_bytes=100)
        backend.register_mem_host_pool_v2(states, "mamba")
        states.fill(0, b"rank %d" % rank)
        transfer = type("Transfer", (), {"name": "mamba", "keys": hashes(0), "host_indices": states.slots(0)})
        assert backend.batch_set_v2([transfer]) == {"mamba": [True]}
        transfer.host_indices = states.slots(3)  # type: ignore[attr-defined]
        assert backend.batch_get_v2([transfer]) == {"mamba": [True]}
        assert states.holds(3, b"rank %d" % rank)
    for backend, _ in ranks:
        backend.close()


def test_a_draft_cache_that_only_rank_0_writes_is_refused(tmp_path: Path) -> None:
    backend, _ = make_rank(tmp_path, 1)
    with pytest.raises(UnsupportedLayoutError, match=r"draft cache \(draft\) differs .* drop --hicache"):
        backend.register_mem_host_pool_v2(FakeHostPool(pages=2), "draft")
    backend.close()
