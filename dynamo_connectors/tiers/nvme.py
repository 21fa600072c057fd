"""G3, NVMe: one preallocated slab file per worker, a verified header before every block, O_DIRECT where it works.

Nothing is synced: this is a cache, and a torn write is a miss because the header no longer proves the payload. A slab
is held by a file lock, so engines may share a directory, and a dead engine's slab is taken over by the next one.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
import threading
from pathlib import Path

from dynamo_connectors.blocks import BlockKey, Namespace
from dynamo_connectors.errors import ConfigError, StoreError
from dynamo_connectors.tiers import slot_header
from dynamo_connectors.tiers.slot_header import HEADER_BYTES

_ALIGN = 4096
#: More engines than this in one directory is taken for a mistake.
_MAX_SLABS = 1024


def slot_bytes(row_bytes: int) -> int:
    """What one block of `row_bytes` takes on disk."""
    return HEADER_BYTES + -(-row_bytes // _ALIGN) * _ALIGN


class NvmeStore:
    """`capacity_blocks` slots in one file under `directory`."""

    def __init__(self, directory: Path, capacity_blocks: int, row_bytes: int, namespace: Namespace) -> None:
        self.capacity_blocks = capacity_blocks
        self.row_bytes = row_bytes
        self._slot_bytes = slot_bytes(row_bytes)
        self._namespace = namespace.digest
        self._sequence = itertools.count(1)
        self._local = threading.local()
        self._fd, self.path = _claim_slab(directory)
        try:
            os.ftruncate(self._fd, 0)
            os.posix_fallocate(self._fd, 0, capacity_blocks * self._slot_bytes)
            self.direct = _enable_direct_io(self._fd, self._staging_buffer())
        except OSError as error:
            self.close()
            gigabytes = capacity_blocks * self._slot_bytes / 1e9
            raise ConfigError(
                f"{directory} cannot hold {gigabytes:.2f} GB for the nvme_ssd tier ({error.strerror}); "
                "lower --kvbm-nvme-gb or free space there"
            ) from error

    def write(self, slot: int, key: BlockKey, row: memoryview) -> None:
        self._refuse_outside(slot)
        staging = self._staging_buffer()
        payload = memoryview(staging)[HEADER_BYTES : HEADER_BYTES + self.row_bytes]
        payload[:] = row
        staging[:HEADER_BYTES] = slot_header.encode(self._namespace, key, payload, next(self._sequence))
        try:
            written = os.pwrite(self._fd, staging, slot * self._slot_bytes)
        except OSError as error:
            raise StoreError("write_failed", f"{self.path}: {error.strerror}") from error
        if written != self._slot_bytes:
            raise StoreError("short_write", f"{self.path}: {written} of {self._slot_bytes} bytes")

    def read(self, slot: int, key: BlockKey, into: memoryview) -> None:
        self._refuse_outside(slot)
        staging = self._staging_buffer()
        try:
            count = os.preadv(self._fd, [staging], slot * self._slot_bytes)
        except OSError as error:
            raise StoreError("read_failed", f"{self.path}: {error.strerror}") from error
        if count != self._slot_bytes:
            raise StoreError("short_read", f"{self.path}: {count} of {self._slot_bytes} bytes")
        payload = memoryview(staging)[HEADER_BYTES : HEADER_BYTES + self.row_bytes]
        slot_header.verify(memoryview(staging)[:HEADER_BYTES], self._namespace, key, payload)
        into[:] = payload

    def close(self) -> None:
        """Removes the slab: its index dies with this process."""
        if self._fd < 0:
            return
        # The name goes first: whoever opens it after the lock is gone would otherwise share a deleted file.
        try:
            self.path.unlink(missing_ok=True)
        finally:
            fd, self._fd = self._fd, -1
            os.close(fd)
            # The buffers go with their last user, be it a read in flight or the traceback of an error.
            self._local = threading.local()

    def _refuse_outside(self, slot: int) -> None:
        # A write behind the end would grow the file past what the user allowed.
        if self._fd < 0 or not 0 <= slot < self.capacity_blocks:
            raise StoreError(
                "no_slot", f"{self.path}: slot {slot} is outside the {self.capacity_blocks}, or it is closed"
            )

    def _staging_buffer(self) -> mmap.mmap:
        """One page-aligned slot per thread, as O_DIRECT asks for."""
        staging: mmap.mmap | None = getattr(self._local, "staging", None)
        if staging is None:
            staging = mmap.mmap(-1, self._slot_bytes)
            self._local.staging = staging
        return staging


def _claim_slab(directory: Path) -> tuple[int, Path]:
    """Opens and locks the first slab that no living engine holds."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for number in range(_MAX_SLABS):
            path = directory / f"kvbm-{number}.slab"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            ours = False
            try:
                ours = _lock_if_current(fd, path)
            finally:
                if not ours:
                    os.close(fd)
            if ours:
                return fd, path
    except OSError as error:
        raise ConfigError(
            f"--kvbm-nvme-path {directory} cannot be used ({error.strerror}); name a directory this user may write to"
        ) from error
    raise ConfigError(f"--kvbm-nvme-path {directory} already serves {_MAX_SLABS} engines; name another directory")


def _lock_if_current(fd: int, path: Path) -> bool:
    """Whether `fd` is locked by us and still the file that `path` names (its owner may have just removed it)."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    try:
        return os.fstat(fd).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _enable_direct_io(fd: int, probe: mmap.mmap) -> bool:
    """Switches `fd` to O_DIRECT if the file system takes it, proven by one read."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.preadv(fd, [probe], 0)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return False
    return True
