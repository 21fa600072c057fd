"""The files of slabs in one directory: claiming one, giving it room, and what others have left behind.

An engine holds its slab by a file lock, so engines may share a directory and a dead engine's slab is free to take.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dynamo_connectors.errors import ConfigError

log = logging.getLogger(__name__)

#: More engines than this in one directory is taken for a mistake.
_MAX_SLABS = 1024
#: Names that this and earlier formats gave to slabs. Nothing else is ever removed.
_SLAB_NAME = re.compile(r"kvbm-(?:[0-9a-f]{16}-)?\d+\.slab")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def log_path(slab: Path) -> Path:
    return slab.with_suffix(".log")


def claim_slab(directory: Path, namespace: bytes) -> tuple[int, Path]:
    """Opens and locks the first slab of `namespace` that no living engine holds; makes one if need be."""
    try:
        with _alone_in(directory):
            for number in range(_MAX_SLABS):
                path = directory / f"kvbm-{namespace.hex()[:16]}-{number}.slab"
                fd = _open_locked(path, os.O_CREAT)
                if fd is not None:
                    return fd, path
    except OSError as error:
        raise ConfigError(
            f"--kvbm-nvme-path {directory} cannot be used ({error.strerror}); name a directory this user may write to"
        ) from error
    raise ConfigError(f"--kvbm-nvme-path {directory} already serves {_MAX_SLABS} engines; name another directory")


def remove_slab(slab: Path) -> None:
    """Removes the files of a slab whose lock the caller holds. The log goes first: without its slab it is garbage."""
    log_file = log_path(slab)
    for path in (log_file, log_file.with_name(log_file.name + ".tmp"), slab):
        path.unlink(missing_ok=True)


def allocate(fd: int, slab: Path, size_bytes: int) -> None:
    """Gives an empty slab its whole size on disk, removing idle leftovers, oldest first, while there is no room."""
    while True:
        try:
            os.posix_fallocate(fd, 0, size_bytes)
            return
        except OSError as error:
            if error.errno not in _NO_ROOM or not _remove_oldest_leftover(slab):
                raise


def report_leftovers(slab: Path) -> None:
    """One line when other slabs that no engine holds take space in this directory."""
    with _alone_in(slab.parent):
        sizes = [os.fstat(fd).st_blocks * 512 for _, fd in _idle_leftovers(slab)]
    if sizes:
        log.info(
            "dynamo: %s also has %d slab(s) of other configurations, %.2f GB, that no engine uses now; "
            "they make room when it is needed",
            slab.parent,
            len(sizes),
            sum(sizes) / 1e9,
        )


def enable_direct_io(fd: int, probe: memoryview) -> bool:
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


def _remove_oldest_leftover(slab: Path) -> bool:
    """False when nothing is left to remove. Slabs of the caller's own namespace go last: they may be a restart's."""
    own = slab.name.rpartition("-")[0] + "-"
    with _alone_in(slab.parent):
        idle = [(path.name.startswith(own), os.fstat(fd).st_mtime, path) for path, fd in _idle_leftovers(slab)]
        if not idle:
            return False
        oldest = min(idle)[2]
        remove_slab(oldest)
    log.info("dynamo: removed %s, which no engine used, to make room", oldest)
    return True


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Keeps others from claiming a slab while this process looks at it, or the other way round."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a network file system may not lock directories
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _idle_leftovers(slab: Path) -> Iterator[tuple[Path, int]]:
    """Slabs beside `slab` that nobody holds, each locked while it is looked at."""
    for path in sorted(slab.parent.glob("kvbm-*.slab")):
        if path == slab or not _SLAB_NAME.fullmatch(path.name):
            continue
        fd = None
        with contextlib.suppress(OSError):  # somebody else's file: not ours to count
            fd = _open_locked(path, 0)
        if fd is not None:
            try:
                yield path, fd
            finally:
                os.close(fd)


def _open_locked(path: Path, flags: int) -> int | None:
    """A descriptor that holds the lock of the file which `path` names, or None when another one does."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    ours = False
    try:
        ours = _lock_if_current(fd, path)
    finally:
        if not ours:
            os.close(fd)
    return fd if ours else None


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
