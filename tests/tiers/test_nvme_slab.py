"""Making, sharing, losing and taking over slab files. The failures are the system's own."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import ConfigError, StoreError
from dynamo_connectors.tiers.nvme import NvmeStore, slot_bytes, slot_offset
from tests.tiers.factories import NAMESPACE, mounted
from tests.tiers.test_conformance import empty, noise, resources

ROW = 10_000
A = BlockKey(b"a" * 32)
#: Makes a store in argv[1], says where, then does what argv[2] says with it.
CHILD = """
import resource, sys
from pathlib import Path
from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.tiers.nvme import NvmeStore
from tests.tiers.factories import NAMESPACE
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    store = NvmeStore(Path(sys.argv[1]), 4, 10_000, NAMESPACE)
except ConfigError as error:
    print(error)
    sys.exit()
store.write(0, BlockKey(b"a" * 32), memoryview(bytes(10_000)))
print(store.path, flush=True)
sys.stdin.read()
"""


def make(directory: Path, capacity_blocks: int = 4) -> NvmeStore:
    return NvmeStore(directory, capacity_blocks, ROW, NAMESPACE)


def child(directory: Path, what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(directory), what]
    return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def refusal(directory: Path, capacity_blocks: int = 4) -> str:
    before = resources()
    with pytest.raises(ConfigError) as caught:
        make(directory, capacity_blocks)
    line = str(caught.value)
    del caught  # it shows the frames that failed, and their buffers with them
    gc.collect()
    assert resources() <= before
    assert "\n" not in line
    return line


def test_the_whole_slab_is_on_the_disk_from_the_start(tmp_path: Path) -> None:
    store = make(tmp_path)
    stat = store.path.stat()
    assert stat.st_size == slot_offset(4, ROW) <= stat.st_blocks * 512
    assert stat.st_mode & 0o077 == 0, "other users can read the cache"
    assert not os.get_inheritable(store._fd)
    store.close()


@pytest.mark.parametrize(("row", "slot"), [(1, 8192), (4096, 8192), (4097, 12288), (0, 4096)])
def test_a_slot_is_a_header_and_whole_pages(row: int, slot: int) -> None:
    assert slot_bytes(row) == slot


def test_two_stores_in_one_directory_have_a_slab_each(tmp_path: Path) -> None:
    one, two = make(tmp_path), make(tmp_path)
    assert one.path != two.path
    one.write(0, A, noise(1, ROW))
    with pytest.raises(StoreError):
        two.read(0, A, empty(ROW))
    one.close()
    three = make(tmp_path)
    assert three.path == one.path
    two.close()
    three.close()
    assert {path.suffix for path in tmp_path.iterdir()} == {".slab", ".log"}


def test_a_killed_engines_slab_is_taken_over_warm(tmp_path: Path) -> None:
    with child(tmp_path, "wait") as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        beside = make(tmp_path)
        assert beside.path != path, "a living engine's slab was taken"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert path.exists()
    heir = make(tmp_path)
    assert heir.path == path
    assert heir.recovered == [(0, A)]
    into = noise(1, ROW)
    heir.read(0, A, into)
    assert into == empty(ROW)
    heir.close()
    beside.close()


def test_a_disk_that_is_too_small_is_one_line_and_leaves_no_file(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path, "size=1m"):
        line = refusal(tmp_path, 4096)
        assert "--kvbm-nvme-gb" in line
        assert "No space left" in line
        assert list(tmp_path.iterdir()) == []
        make(tmp_path).close()


def test_a_limit_on_file_size_is_one_line_and_leaves_no_file(tmp_path: Path) -> None:
    with child(tmp_path, "limit") as process:
        output, _ = process.communicate("")
    assert process.returncode == 0
    assert output.count("\n") == 1
    assert "--kvbm-nvme-gb" in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/below", "/proc", "nowhere"])
def test_a_path_that_cannot_hold_files_is_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    line = refusal(tmp_path / place)
    assert line.startswith("--kvbm-nvme-path")
    assert "name a directory" in line


def test_a_directory_on_a_read_only_disk_is_one_line(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path, "ro"):
        assert "Read-only" in refusal(tmp_path)


def test_a_file_system_without_direct_io_works_through_the_page_cache(tmp_path: Path) -> None:
    with mounted("ramfs", tmp_path):
        store = make(tmp_path)
        assert not store.direct
        assert not fcntl.fcntl(store._fd, fcntl.F_GETFL) & os.O_DIRECT
        store.write(3, A, noise(3, ROW))
        into = empty(ROW)
        store.read(3, A, into)
        assert into == noise(3, ROW)
        store.close()
        store = make(tmp_path)
        store.read(3, A, into)
        store.close()


def test_direct_io_is_on_where_the_store_says_so(tmp_path: Path) -> None:
    store = make(tmp_path)
    assert bool(fcntl.fcntl(store._fd, fcntl.F_GETFL) & os.O_DIRECT) == store.direct
    store.close()


def test_a_slab_deleted_by_somebody_still_serves_its_engine(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.path.unlink()
    store.write(0, A, noise(1, ROW))
    store.read(0, A, empty(ROW))
    other = make(tmp_path)
    assert other.path == store.path
    with pytest.raises(StoreError):
        other.read(0, A, empty(ROW))
    other.close()
    store.close()


def test_a_slab_that_cannot_be_removed_is_closed_all_the_same(tmp_path: Path) -> None:
    before = resources()
    store = NvmeStore(tmp_path, 4, ROW, NAMESPACE, persistent=False)
    store.path.unlink()
    store.path.mkdir()
    with pytest.raises(IsADirectoryError):
        store.close()
    assert resources() <= before
    store.close()


@pytest.mark.parametrize(("call", "code"), [("fcntl.flock", errno.ENOLCK), ("os.preadv", errno.EIO)])
def test_a_file_system_that_fails_at_the_start_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    """Neither failure can be had from a local disk on demand."""

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(call, fail)
    assert os.strerror(code) in refusal(tmp_path)
    assert call == "fcntl.flock" or list(tmp_path.iterdir()) == []
