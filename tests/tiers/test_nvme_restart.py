"""A slab's second life: what was written is found again after any end, and nothing else is ever served."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import ConfigError, StoreError
from dynamo_connectors.tiers import nvme, slab_format
from dynamo_connectors.tiers.nvme import NvmeStore, slot_offset
from dynamo_connectors.tiers.slab_files import log_path
from tests.tiers.factories import NAMESPACE, mounted
from tests.tiers.slabs import CAPACITY, ROW, bytes_of, fill, key_of, make, read_all, run_until_killed

OTHER = replace(NAMESPACE, model="another")


def test_a_closed_slab_is_found_again_oldest_first(tmp_path: Path) -> None:
    store = make(tmp_path)
    assert not store.recovered
    fill(store, range(20))
    store.close()
    store = make(tmp_path)
    assert store.recovered == [(n % CAPACITY, key_of(n)) for n in range(4, 20)]
    assert read_all(store) == {"right": CAPACITY}
    fill(store, range(20, 23))
    store.close()
    store = make(tmp_path)
    assert [key for _, key in store.recovered] == [key_of(n) for n in range(7, 23)]
    assert read_all(store) == {"right": CAPACITY}
    store.close()


def test_a_block_in_two_slots_is_found_in_the_newer_one(tmp_path: Path) -> None:
    store = make(tmp_path)
    for slot in (1, 2, 0):
        store.write(slot, key_of(7), bytes_of(key_of(7)))
    store.close()
    store = make(tmp_path)
    assert store.recovered == [(0, key_of(7))]
    store.close()


@pytest.mark.parametrize("seconds", [0.15, 0.4, 0.8])
def test_killed_while_threads_write_every_block_found_again_is_right(tmp_path: Path, seconds: float) -> None:
    """The log is rewritten all the time, too: its growth bound is made tiny."""
    program = f"""
index_log.MIN_GROWTH_BYTES = 200
fill(store, range({CAPACITY}))
threading.Timer({seconds}, die).start()
def work(slot):
    for number in range(slot, 10**9, {CAPACITY}):
        store.write(slot, key_of(number), bytes_of(key_of(number)))
for slot in range(8):
    threading.Thread(target=work, args=(slot,)).start()
"""
    run_until_killed(tmp_path, program)
    store = make(tmp_path)
    outcomes = read_all(store)
    # At most the eight slots being written can be torn or newer than the log says.
    assert outcomes["right"] >= CAPACITY - 8
    assert sum(outcomes.values()) >= CAPACITY - 8
    assert set(outcomes) <= {"right", "wrong_key", "bad_checksum", "bad_header"}
    store.check()
    store.close()


def test_killed_between_the_bytes_and_the_log_the_slot_is_a_miss(tmp_path: Path) -> None:
    run_until_killed(tmp_path, "fill(store, range(4))\nindex_log.IndexLog.append = die\nfill(store, range(16, 17))\n")
    store = make(tmp_path)
    assert [key for _, key in store.recovered] == [key_of(n) for n in range(4)]
    assert read_all(store) == {"right": 3, "wrong_key": 1}
    store.close()
    store = make(tmp_path)
    assert len(store.recovered) == 3, "the last checkpoint kept what had proved wrong"
    store.close()


def test_a_slot_half_rewritten_is_a_miss_under_its_old_key(tmp_path: Path) -> None:
    program = """
fill(store, range(4))
real = os.pwritev
def half(fd, vectors, at):
    whole = b"".join(vectors)
    buffer = nvme.mmap.mmap(-1, len(whole)); buffer[:] = whole
    real(fd, [memoryview(buffer)[8192:]], at + 8192)
    die()
os.pwritev = half
fill(store, range(17, 18))
"""
    run_until_killed(tmp_path, program)
    store = make(tmp_path)
    assert read_all(store) == {"right": 3, "bad_checksum": 1}
    store.close()


def test_the_log_cut_at_every_byte_of_its_tail_serves_right_bytes_or_none(tmp_path: Path) -> None:
    store = make(tmp_path)
    fill(store, range(CAPACITY))
    log_file = log_path(store.path)
    store.close()
    store = make(tmp_path)
    fill(store, range(CAPACITY, CAPACITY + 3))
    whole = log_file.read_bytes()
    store._log.abandon()  # type: ignore[union-attr]
    store._let_go()
    record = (len(whole) - slab_format.LOG_HEADER_BYTES) // (CAPACITY + 3)
    for cut in range(len(whole) - 3 * record, len(whole) + 1):
        log_file.write_bytes(whole[:cut])
        store = make(tmp_path)
        outcomes = read_all(store)
        assert outcomes["right"] >= CAPACITY - 3
        assert set(outcomes) <= {"right", "wrong_key"}
        store._log.abandon()  # type: ignore[union-attr]
        store._let_go()


def test_another_configuration_gets_a_slab_of_its_own(tmp_path: Path) -> None:
    store = make(tmp_path)
    fill(store, range(3))
    store.close()
    other = make(tmp_path, OTHER)
    assert other.path != store.path
    assert other.recovered == ()
    fill(other, range(5))
    other.close()
    store = make(tmp_path)
    assert read_all(store) == {"right": 3}
    store.close()


def rewrite_superblock(path: Path, **changes: object) -> None:
    with path.open("r+b") as file:
        block = slab_format.decode_superblock(file.read(4096))
        file.seek(0)
        file.write(slab_format.encode_superblock(block._replace(**changes)))


def damage(store: NvmeStore, what: str) -> None:
    if what == "namespace":
        rewrite_superblock(store.path, namespace=OTHER.digest)
    elif what == "generation":
        rewrite_superblock(store.path, generation=b"x" * 16)
    elif what == "row":
        rewrite_superblock(store.path, row_bytes=ROW - 1)
    elif what == "truncated":
        os.truncate(store.path, slot_offset(3, ROW))
    elif what == "first page lost":
        os.truncate(store.path, 10)
    else:
        at, byte = {"magic": (0, 1), "version": (8, 9), "bit": (40, 255), "zeros": (0, 0)}[what]
        with store.path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([byte]) * (4096 if what == "zeros" else 1))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("namespace", "another model"),
        ("generation", "0 blocks"),
        ("row", "other sizes"),
        ("truncated", "it was cut"),
        ("first page lost", "another format"),
        ("magic", "another format"),
        ("version", "format version 9"),
        ("bit", "damaged"),
        ("zeros", "never finished"),
    ],
)
def test_a_slab_that_is_not_ours_to_read_starts_empty_with_one_line(
    tmp_path: Path, what: str, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = make(tmp_path)
    fill(store, range(CAPACITY))
    store.close()
    damage(store, what)
    caplog.set_level("INFO")
    caplog.clear()
    store = make(tmp_path)
    assert [says in line for line in caplog.messages] == [True]
    assert not store.recovered
    for slot in range(CAPACITY):
        with pytest.raises(StoreError):
            store.read(slot, key_of(slot), memoryview(bytearray(ROW)))
    fill(store, range(2))
    store.close()
    store = make(tmp_path)
    assert read_all(store) == {"right": 2}
    store.close()


def test_another_size_starts_empty_and_the_old_size_does_not_come_back(tmp_path: Path) -> None:
    for capacity in (CAPACITY, CAPACITY + 1, CAPACITY):
        store = make(tmp_path, capacity=capacity)
        assert not store.recovered
        fill(store, range(3))
        store.close()


def test_a_lost_log_is_an_empty_slab(tmp_path: Path) -> None:
    store = make(tmp_path)
    fill(store, range(3))
    store.close()
    log_path(store.path).unlink()
    store = make(tmp_path)
    assert not store.recovered
    fill(store, range(4, 6))
    store.close()
    store = make(tmp_path)
    assert read_all(store) == {"right": 2}
    store.close()


def test_clocks_that_jump_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = iter(range(10**9, 0, -(10**7)))
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: next(jumps) * 10**9)
    store = make(tmp_path)
    fill(store, range(20))
    store.close()
    for path, when in ((store.path, 0), (log_path(store.path), 2**33)):
        os.utime(path, (when, when))
    store = make(tmp_path)
    assert [key for _, key in store.recovered] == [key_of(n) for n in range(4, 20)]
    assert read_all(store) == {"right": CAPACITY}
    store.close()


def unreadable(store: NvmeStore, slots: Sequence[int]) -> None:
    for slot in slots:
        with pytest.raises(StoreError):
            store.read(slot, key_of(slot), memoryview(bytearray(ROW)))


def test_forgotten_blocks_are_gone_now_and_after_a_restart_and_so_is_all_that_follows(tmp_path: Path) -> None:
    store = make(tmp_path)
    fill(store, range(4))
    store.forget()
    unreadable(store, range(4))
    fill(store, range(2, 3))
    store.read(2, key_of(2), memoryview(bytearray(ROW)))
    store.forget()
    unreadable(store, range(4))
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_killed_after_forgetting_nothing_comes_back(tmp_path: Path) -> None:
    old_log = tmp_path / "old"
    program = f"""
fill(store, range(8))
import shutil; shutil.copy(str(store.path)[:-4] + "log", {str(old_log)!r})
store.forget()
fill(store, range(8, 12))
die()
"""
    run_until_killed(tmp_path, program)
    (slab,) = tmp_path.glob("*.slab")
    old_log.rename(log_path(slab))  # a log that survived after all says nothing about a new generation
    store = make(tmp_path)
    assert not store.recovered
    unreadable(store, range(12))
    store.close()


def test_a_write_that_ends_after_forgetting_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path)
    started, go_on, real = threading.Event(), threading.Event(), os.pwritev

    def slow(*arguments: object) -> int:
        started.set()
        assert go_on.wait(20)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwritev", slow)
    writer = threading.Thread(target=fill, args=(store, range(1)))
    writer.start()
    assert started.wait(20)
    store.forget()
    go_on.set()
    writer.join()
    unreadable(store, [0])
    store.close()


def test_forgetting_does_not_wait_for_a_disk_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = make(tmp_path)
    fill(store, range(4))
    go_on, real = threading.Event(), os.pwrite
    monkeypatch.setattr(nvme, "_FORGET_SECONDS", 0.1)
    monkeypatch.setattr(os, "pwrite", lambda *arguments: go_on.wait(60) and real(*arguments))
    store.forget()
    assert caplog.text.count("does not answer") == 1
    unreadable(store, range(4))
    store.close()
    assert store._fd >= 0, "closed under the write that still hangs"
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "kvbm-disk-forget":
            thread.join(20)
    assert store._fd < 0
    assert list(tmp_path.iterdir()) == []


def test_a_slab_that_cannot_be_marked_as_forgotten_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make(tmp_path)
    fill(store, range(4))
    good = os.dup(store._fd)
    with open("/dev/full", "r+b", buffering=0) as full:
        os.dup2(full.fileno(), store._fd, inheritable=False)
    store.forget()
    os.dup2(good, store._fd, inheritable=False)
    os.close(good)
    assert caplog.text.count("cannot be marked") == 1
    assert list(tmp_path.iterdir()) == []
    unreadable(store, range(4))
    store.close()


def test_a_slab_that_is_not_to_last_is_not_found_again_even_after_a_kill(tmp_path: Path) -> None:
    program = "store.close()\nstore = NvmeStore(Path(sys.argv[1]), 16, ROW, NAMESPACE, persistent=False)\n"
    run_until_killed(tmp_path, program + "fill(store, range(4))\ndie()\n")
    store = make(tmp_path)
    assert not store.recovered
    store.close()


def test_leftovers_are_named_and_make_room_when_it_is_needed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A disk for three slabs: the oldest idle one goes, the newer idle and the living ones stay."""
    caplog.set_level("INFO")
    size = 4096 * (3 * (1 + 4 * CAPACITY) + 40)
    with mounted("tmpfs", tmp_path, f"size={size}"):
        living = make(tmp_path, replace(NAMESPACE, model="living"))
        paths = []
        for age, model in ((100, "older"), (200, "newer")):
            idle = make(tmp_path, replace(NAMESPACE, model=model))
            idle.close()
            os.utime(idle.path, (age, age))
            paths.append(idle.path)
        (tmp_path / "kvbm-notes.slab").touch()
        fill(living, range(CAPACITY))
        caplog.clear()
        mine = make(tmp_path)
        assert caplog.text.count("removed") == 1
        assert "1 slab(s) of other configurations" in caplog.text
        assert [path.exists() for path in paths] == [False, True]
        assert (tmp_path / "kvbm-notes.slab").exists()
        with pytest.raises(ConfigError, match="--kvbm-nvme-gb"):
            make(tmp_path, replace(NAMESPACE, model="large"), 3 * CAPACITY)
        fill(mine, range(3))
        assert [living.read(n, key_of(n), memoryview(bytearray(ROW))) for n in range(CAPACITY)]
        mine.close()
        living.close()


def test_an_engine_that_dies_while_another_lives_leaves_its_own_slab_to_the_next(tmp_path: Path) -> None:
    living = make(tmp_path)
    fill(living, range(2))
    run_until_killed(tmp_path, "fill(store, range(5, 9))\ndie()\n")
    heir = make(tmp_path)
    assert heir.path != living.path
    assert [key for _, key in heir.recovered] == [key_of(n) for n in range(5, 9)]
    assert read_all(heir) == {"right": 4}
    heir.close()
    living.close()


def test_slots_side_by_side_move_in_one_request(tmp_path: Path) -> None:
    store = make(tmp_path)
    keys = [BlockKey(key_of(n)) for n in range(5)]
    store.write_run(3, keys, [bytes_of(key) for key in keys])
    into = [memoryview(bytearray(ROW)) for _ in keys]
    assert store.read_run(3, keys, into) == [None] * 5
    assert into == [bytes_of(key) for key in keys]
    outcomes = store.read_run(3, [keys[0], keys[2], keys[2]], into[:3])
    assert [error and error.reason for error in outcomes] == [None, "wrong_key", None]
    with pytest.raises(StoreError, match="no_slot"):
        store.write_run(CAPACITY - 4, keys, into)
    store.close()
    store = make(tmp_path)
    assert store.recovered == [(3 + n, key) for n, key in enumerate(keys)], "asking for another key cost the block"
    store.close()
