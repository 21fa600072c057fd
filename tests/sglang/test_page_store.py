"""One lock, many threads, a disk that fails: never wrong bytes, and every lost page is counted."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_connectors.block_manager import NamedTier
from dynamo_connectors.blocks import BlockKey, Namespace
from dynamo_connectors.errors import StoreError
from dynamo_connectors.sglang import page_io
from dynamo_connectors.sglang.page_io import PageMover
from dynamo_connectors.sglang.page_store import PageStore, Transfer, Watcher
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.tiers.index import TierIndex
from dynamo_connectors.tiers.nvme import NvmeStore, slot_bytes
from dynamo_connectors.tiers.slab_format import PAGE_BYTES

ROW = 512
NAMESPACE = Namespace("sglang", "tiny", "", "bf16", "layout", 16)
MakeStore = Callable[..., PageStore]


def content(key: BlockKey, num_bytes: int = ROW) -> bytes:
    return (bytes(key) * num_bytes)[:num_bytes]


def page_of(row: bytes | bytearray, cut: int = 200) -> list[memoryview]:
    """A row in two pieces, as K and V lie in SGLang's host pool."""
    whole = memoryview(row)
    return [whole[:cut], whole[cut:]]


def keys_of(*names: str) -> list[BlockKey]:
    return [BlockKey(name.encode()) for name in names]


def put(store: PageStore, keys: list[BlockKey]) -> list[bool]:
    return store.put(keys, [page_of(content(key)) for key in keys])


def get(store: PageStore, keys: list[BlockKey]) -> list[bytes | None]:
    rows = [bytearray(ROW) for _ in keys]
    found = store.get(keys, [page_of(row) for row in rows])
    return [bytes(row) if here else None for row, here in zip(rows, found, strict=True)]


class MemoryDisk(DramStore):
    """A disk that is empty at every start."""

    recovered: Sequence[tuple[int, BlockKey]] = ()

    def forget(self) -> None:
        pass


class BrokenDisk(MemoryDisk):
    """Fails on request, as a full or dying disk does."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity, ROW)
        self.broken: set[BlockKey] = set()
        self.error: Exception = StoreError("write_failed", "No space left on device")

    def write(self, slot: int, key: BlockKey, row: memoryview) -> None:
        if key in self.broken:
            raise self.error
        super().write(slot, key, row)


class HangingDisk(MemoryDisk):
    """Answers when `go_on` is set."""

    def __init__(self) -> None:
        super().__init__(8, ROW)
        self.go_on = threading.Event()
        self.go_on.set()

    def read(self, slot: int, key: BlockKey, into: memoryview) -> None:
        assert self.go_on.wait(60)
        super().read(slot, key, into)

    def write(self, slot: int, key: BlockKey, row: memoryview) -> None:
        assert self.go_on.wait(60)
        super().write(slot, key, row)


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[MakeStore]:
    made: list[PageStore] = []

    def make(capacity: int = 8, store: object = None, watcher: Watcher | None = None) -> PageStore:
        disk = store if store is not None else NvmeStore(tmp_path, capacity, ROW, NAMESPACE)
        watcher = watcher or Watcher()
        pages = PageStore("nvme_ssd", disk, watcher, PageMover(4))  # type: ignore[arg-type]
        made.append(pages)
        return pages

    yield make
    for pages in made:
        pages.check()
        pages.close()


class RestingDisk(MemoryDisk):
    """Turned off after errors in a row: it answers nothing for a while, and holds what it held."""

    is_off = False

    def read(self, slot: int, key: BlockKey, into: memoryview) -> None:
        if self.is_off:
            raise StoreError("tier_off", "it failed 8 times in a row")
        super().read(slot, key, into)


def test_a_disk_that_is_off_for_a_while_loses_nothing(make_store: MakeStore) -> None:
    disk, keys = RestingDisk(8, ROW), keys_of("a", "b")
    store = make_store(store=disk)
    put(store, keys)
    disk.is_off = True
    assert get(store, keys) == [None, None]
    disk.is_off = False
    assert get(store, keys) == [content(key) for key in keys]


def slab_of(tmp_path: Path) -> Path:
    (slab,) = tmp_path.glob("*.slab")
    return slab


def test_what_goes_in_comes_out(make_store: MakeStore) -> None:
    moved: list[Transfer] = []
    store = make_store(watcher=Watcher(on_transfer=moved.append))
    keys = keys_of("a", "b", "c")
    assert store.match(keys) == 0
    assert put(store, keys) == [True] * 3
    assert store.match(keys) == 3
    assert get(store, keys) == [content(key) for key in keys]
    assert (store.counts().written_pages, store.counts().read_pages) == (3, 3)
    assert [(transfer.is_read, transfer.pages, transfer.num_bytes) for transfer in moved] == [
        (False, 3, 3 * ROW),
        (True, 3, 3 * ROW),
    ]
    assert store.counts().asked_pages == 6


def test_only_the_leading_run_counts(make_store: MakeStore) -> None:
    store = make_store()
    put(store, keys_of("a", "c"))
    assert store.match(keys_of("a", "b", "c")) == 1
    assert get(store, keys_of("a", "b", "c")) == [content(BlockKey(b"a")), None, None]


def test_a_page_that_is_here_is_not_written_again(make_store: MakeStore) -> None:
    store = make_store()
    put(store, keys_of("a"))
    assert put(store, keys_of("a", "b")) == [True, True]
    assert store.counts().written_pages == 2


def test_a_chain_longer_than_the_tier_keeps_its_head(make_store: MakeStore) -> None:
    store = make_store(4)
    put(store, keys_of("a", "b"))
    assert put(store, keys_of("a", "b", "c", "d", "e", "f")) == [True] * 4 + [False] * 2
    assert store.match(keys_of("a", "b", "c", "d", "e")) == 4
    assert store.counts().dropped == {"tier_busy": 2}


def test_old_pages_make_room(make_store: MakeStore) -> None:
    store = make_store(2)
    put(store, keys_of("a", "b"))
    put(store, keys_of("c"))
    assert store.match(keys_of("c")) == 1
    assert store.counts().evicted_pages == 1


@pytest.mark.parametrize("offset", [0, 56, 4096, 4096 + 300], ids=["magic", "key", "payload", "payload end"])
def test_a_flipped_byte_on_disk_is_a_miss_for_ever(make_store: MakeStore, tmp_path: Path, offset: int) -> None:
    store = make_store()
    keys = keys_of("a", "b", "c")
    put(store, keys)
    slab = slab_of(tmp_path)
    with slab.open("r+b") as file:
        file.seek(PAGE_BYTES + slot_bytes(ROW) + offset)
        (byte,) = file.read(1)
        file.seek(PAGE_BYTES + slot_bytes(ROW) + offset)
        file.write(bytes([byte ^ 1]))
    assert get(store, keys) == [content(keys[0]), None, content(keys[2])]
    assert store.match(keys) == 1
    assert sum(store.counts().load_failures.values()) == 1
    assert store.counts().dropped == {"damaged": 1}
    assert put(store, keys) == [True] * 3
    assert get(store, keys) == [content(key) for key in keys]


def test_a_slab_cut_short_is_a_miss(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store()
    put(store, keys_of("a", "b"))
    with slab_of(tmp_path).open("r+b") as file:
        file.truncate(PAGE_BYTES + slot_bytes(ROW) + 100)
    assert get(store, keys_of("a", "b")) == [content(BlockKey(b"a")), None]
    assert store.counts().load_failures == {"short_read": 1}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StoreError("write_failed", "No space left"), "write_failed"),
        (OSError(errno.EIO, "I/O error"), "internal_error"),
    ],
)
def test_a_failing_disk_loses_pages_not_answers(make_store: MakeStore, error: Exception, reason: str) -> None:
    disk = BrokenDisk(8)
    disk.broken, disk.error = set(keys_of("b")), error
    store = make_store(store=disk)
    keys = keys_of("a", "b", "c")
    kept = put(store, keys)
    assert kept[0]
    assert not kept[1]
    assert store.match(keys) == 1
    assert store.counts().dropped[reason] >= 1
    disk.broken = set()
    assert put(store, keys) == [True] * 3


def test_pages_of_another_length_are_refused(make_store: MakeStore) -> None:
    store = make_store()
    assert store.put(keys_of("a"), [page_of(bytes(ROW + 1))]) == [False]
    assert store.put(keys_of("a"), [page_of(bytes(ROW - 1))]) == [False]
    put(store, keys_of("a"))
    assert store.get(keys_of("a"), [page_of(bytearray(ROW - 1))]) == [False]


def test_suspended_nothing_is_stored_or_served_and_afterwards_nothing_old_is_there(make_store: MakeStore) -> None:
    store = make_store()
    keys = keys_of("a")
    put(store, keys)
    store.suspend()
    assert store.match(keys) == 0
    assert get(store, keys) == [None]
    assert put(store, keys) == [False]
    store.resume()
    assert store.match(keys) == 0
    assert put(store, keys) == [True]
    store.resume()
    assert store.match(keys) == 1
    store.clear()
    assert store.match(keys) == 0


def test_closed_everything_is_a_miss(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store()
    put(store, keys_of("a"))
    store.close()
    store.close()
    assert store.match(keys_of("a")) == 0
    assert get(store, keys_of("a")) == [None]
    assert put(store, keys_of("b")) == [False]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".log", ".slab"], "the next engine finds them"


def test_a_page_being_written_when_the_cache_is_cleared_is_not_kept(make_store: MakeStore) -> None:
    started, go_on = threading.Event(), threading.Event()

    class SlowDisk(MemoryDisk):
        def write(self, slot: int, key: BlockKey, row: memoryview) -> None:
            started.set()
            assert go_on.wait(10)
            super().write(slot, key, row)

    store = make_store(store=SlowDisk(4, ROW))
    answers: list[list[bool]] = []
    writer = threading.Thread(target=lambda: answers.append(put(store, keys_of("a"))))
    writer.start()
    assert started.wait(10)
    assert store.match(keys_of("a")) == 0
    store.suspend()
    store.resume()
    go_on.set()
    writer.join()
    assert answers == [[False]]
    assert store.match(keys_of("a")) == 0


def test_threads_that_write_read_and_evict_never_see_wrong_bytes(make_store: MakeStore) -> None:
    store = make_store(16)
    chains = [keys_of(*(f"{chain}.{page}" for page in range(8))) for chain in range(6)]
    wrong: list[str] = []
    hits = [0] * 6

    def hammer(seed: int) -> None:
        choose = random.Random(seed)
        for turn in range(60):
            keys = choose.choice(chains)[: choose.randint(1, 8)]
            if choose.random() < 0.5:
                put(store, keys)
                continue
            for key, row in zip(keys, get(store, keys), strict=True):
                hits[seed] += row is not None
                if row is not None and row != content(key):
                    wrong.append(f"turn {turn}: {key!r} came back as something else")
            if turn == 30 and seed == 0:
                store.clear()

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(hits) > 0
    assert store.counts().evicted_pages > 0


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.binary(min_size=ROW, max_size=ROW), min_size=1, max_size=12, unique=True),
    cut=st.integers(0, ROW),
)
def test_any_bytes_cut_anywhere_come_back(rows: list[bytes], cut: int) -> None:
    store = PageStore("nvme_ssd", MemoryDisk(16, ROW), mover=PageMover(3))
    try:
        keys = keys_of(*(str(position) for position in range(len(rows))))
        assert all(store.put(keys, [page_of(row, cut) for row in rows]))
        into = [bytearray(ROW) for _ in rows]
        assert all(store.get(keys, [page_of(row, ROW - cut) for row in into]))
        assert [bytes(row) for row in into] == rows
    finally:
        store.close()


def test_a_disk_that_hangs_is_a_miss_at_the_deadline_and_touches_no_page_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SGLang gives the page to somebody else by then; and it may detach without waiting for the disk."""
    monkeypatch.setattr(page_io, "CLOSE_SECONDS", 0.1)
    disk = HangingDisk()
    mover = PageMover(2)
    store = PageStore("nvme_ssd", disk, mover=mover)
    kept, late = keys_of("kept"), keys_of("late")
    assert put(store, kept) == [True]
    monkeypatch.setattr(mover, "_seconds", 0.2)
    disk.go_on.clear()
    row, leaving = bytearray(b"?" * ROW), bytearray(content(late[0]))
    assert store.get(kept, [page_of(row)]) == [False]
    assert store.put(late, [page_of(leaving)]) == [False]
    leaving[:] = b"!" * ROW
    counts = store.counts()
    assert (counts.load_failures, counts.dropped) == ({"timeout": 1}, {"timeout": 1})
    store.check()
    store.close()
    assert "does not answer" in caplog.text
    disk.go_on.set()
    for thread in [thread for thread in threading.enumerate() if thread.name.startswith("dynamo-kvbm")]:
        thread.join(60)
    assert row == b"?" * ROW, "a late answer wrote into a page that was given back"


def test_everything_is_closed_by_one_deadline() -> None:
    """A disk and a store that hang do not add up: each is told an earlier end than the last."""
    told: dict[str, float] = {}

    class Mover(PageMover):
        def close(self, deadline: float) -> bool:
            told["transfers"] = deadline
            return super().close(deadline)

    class Below:
        named = NamedTier("object_store", TierIndex(4, erases=True), 2)
        min_touches = 1

        def when_listed(self, tell: Callable[[], None]) -> None: ...

        def close(self, deadline: float) -> None:
            told["lower"] = deadline

    store = PageStore("nvme_ssd", MemoryDisk(8, ROW), mover=Mover(1), lower=Below())  # type: ignore[arg-type]
    begun = time.monotonic()
    store.close(begun + 1000)
    assert begun < told["transfers"] < told["lower"] < begun + 1000
