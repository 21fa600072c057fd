"""A device that fails while it is used. The errors are the system's own: /dev/full has no room, and below its first
mapping /proc/self/mem answers every read and write with EIO."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from dynamo_connectors.errors import StoreError
from dynamo_connectors.tiers.circuit import Circuit
from dynamo_connectors.tiers.nvme import NvmeStore
from tests.tiers.factories import NAMESPACE, mounted
from tests.tiers.slabs import ROW, fill, key_of, make, read_all

#: An engine that loses its rights: as root it becomes nobody, else the directory is closed to its owner.
LOSES_RIGHTS = """
import os, sys
from pathlib import Path
from tests.tiers.slabs import *
from dynamo_connectors.tiers import index_log
index_log.MIN_GROWTH_BYTES = 2000
store = make(Path(sys.argv[1]))
fill(store, range(16))
os.chmod(sys.argv[1], 0o500)
if os.getuid() == 0:
    os.setuid(65534)
fill(store, range(16, 400))
into = memoryview(bytearray(ROW))
for number in range(384, 400):
    store.read(number % 16, key_of(number), into)
    assert into == bytes_of(key_of(number))
store.check()
store.close()
print("went on")
"""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def device(store: NvmeStore, path: str) -> Iterator[None]:
    """Puts `path` under the store's descriptor."""
    good = os.dup(store._fd)
    bad = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(bad, store._fd, inheritable=False)
    os.close(bad)
    try:
        yield
    finally:
        os.dup2(good, store._fd, inheritable=False)
        os.close(good)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[NvmeStore]:
    store = NvmeStore(tmp_path, 16, ROW, NAMESPACE, clock=clock)
    fill(store, range(4))
    yield store
    store.close()


def reason_of_read(store: NvmeStore, number: int) -> str:
    with pytest.raises(StoreError) as caught:
        store.read(number, key_of(number), memoryview(bytearray(ROW)))
    return caught.value.reason


def reason_of_write(store: NvmeStore, number: int) -> str:
    with pytest.raises(StoreError) as caught:
        fill(store, range(number, number + 1))
    return caught.value.reason


def test_a_full_disk_fails_the_write_and_keeps_what_was_there(store: NvmeStore) -> None:
    with device(store, "/dev/full"):
        assert reason_of_write(store, 5) == "write_failed"
        assert reason_of_write(store, 16) == "write_failed"
    assert reason_of_read(store, 5) == "bad_header"
    store.read(0, key_of(0), memoryview(bytearray(ROW)))


def test_an_io_error_is_a_miss_each_way(store: NvmeStore) -> None:
    with device(store, "/proc/self/mem"):
        assert reason_of_read(store, 1) == "read_failed"
        assert reason_of_write(store, 2) == "write_failed"
    store.read(1, key_of(1), memoryview(bytearray(ROW)))
    store.read(2, key_of(2), memoryview(bytearray(ROW)))


def test_a_disk_that_is_gone_turns_the_tier_off_in_one_line_until_it_is_back(
    store: NvmeStore, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with device(store, "/proc/self/mem"):
        assert [reason_of_read(store, 1) for _ in range(8)] == ["read_failed"] * 8
        assert caplog.text.count("nvme_ssd tier off") == 1
        assert reason_of_read(store, 1) == reason_of_write(store, 5) == "tier_off"
        clock.now += 31
        assert reason_of_read(store, 1) == "read_failed", "nobody tried again"
        assert reason_of_read(store, 1) == "tier_off", "more than one tried"
        clock.now += 31
    store.read(1, key_of(1), memoryview(bytearray(ROW)))
    store.read(2, key_of(2), memoryview(bytearray(ROW)))
    fill(store, range(5, 6))
    assert caplog.text.count("nvme_ssd tier off") == caplog.text.count("nvme_ssd tier on again") == 1
    assert not [line for line in caplog.messages if "\n" in line]


def test_single_errors_between_successes_never_turn_it_off(store: NvmeStore) -> None:
    for _ in range(20):
        with device(store, "/proc/self/mem"):
            assert reason_of_read(store, 1) == "read_failed"
        store.read(1, key_of(1), memoryview(bytearray(ROW)))


def test_damage_is_not_an_error_of_the_device(store: NvmeStore) -> None:
    """After a power cut many entries may prove nothing: that is no reason to leave the disk alone."""
    for _ in range(20):
        assert reason_of_read(store, 9) == "bad_header"
    store.read(1, key_of(1), memoryview(bytearray(ROW)))


def test_a_file_cut_short_under_a_running_engine_turns_it_off(store: NvmeStore) -> None:
    os.truncate(store.path, 0)
    assert [reason_of_read(store, 1) for _ in range(9)] == ["short_read"] * 8 + ["tier_off"]


def test_a_disk_without_room_for_the_log_serves_what_it_has_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with mounted("tmpfs", tmp_path, "size=2m"):
        store = make(tmp_path)
        fill(store, range(16))
        store.close()
        with suppress(OSError), (tmp_path / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        assert os.statvfs(tmp_path).f_bavail == 0
        store = make(tmp_path)
        assert read_all(store) == {"right": 16}
        fill(store, range(16, 18))
        store.read(0, key_of(16), memoryview(bytearray(ROW)))
        assert caplog.text.count("cannot be written (") == 1
        store.close()
        (tmp_path / "filler").unlink()
        store = make(tmp_path)
        assert read_all(store) == {"right": 14, "wrong_key": 2}
        store.close()


def test_rights_that_are_lost_cost_the_log_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    folder.mkdir()
    if os.getuid() == 0:
        for parent in [tmp_path, *tmp_path.parents][:3]:
            parent.chmod(parent.stat().st_mode | 0o055)
    command = [sys.executable, "-c", LOSES_RIGHTS, str(folder)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    folder.chmod(0o700)
    assert ended.stdout == "went on\n", ended.stderr
    assert ended.stderr.count("cannot be written (") == 1, ended.stderr
    assert "Permission denied" in ended.stderr
    log_bytes = sum(path.stat().st_size for path in folder.glob("*.log"))
    assert log_bytes < 6000, "without checkpoints the log must stop growing"
    store = make(folder)
    outcomes = read_all(store)
    assert sum(outcomes.values()) == 16
    assert set(outcomes) == {"wrong_key"}, "all of them were overwritten after the log had ended"
    store.close()


def test_every_step_of_a_circuit() -> None:
    circuit = Circuit(errors_to_open=2, retry_seconds=10)
    assert circuit.admits(0)
    assert not circuit.note_error(0)
    assert not circuit.note_success()
    assert [circuit.note_error(1), circuit.note_error(2), circuit.note_error(3)] == [False, True, False]
    assert circuit.is_open
    assert [circuit.admits(t) for t in (3, 11.9, 12, 12.1, 21.9, 22)] == [False, False, True, False, False, True]
    assert not circuit.note_error(23)
    assert circuit.note_success()
    assert not circuit.is_open
    assert circuit.admits(23)
