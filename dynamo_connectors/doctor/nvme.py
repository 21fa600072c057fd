"""The directory of the nvme_ssd tier: there, writable, with room, and whether it takes direct I/O."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from pathlib import Path

from dynamo_connectors.doctor.finding import Finding, Level, in_gb
from dynamo_connectors.host_room import slab_room_bytes

NAME = "nvme_ssd"
PAGE_BYTES = 4096
GIGABYTE = 10**9


def write_directly(path: Path) -> None:
    """Writes and reads one page past the page cache; raises OSError where the file system refuses."""
    descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, PAGE_BYTES) as page:  # anonymous maps are page-aligned, as O_DIRECT wants
            page.write(b"dynamo" * (PAGE_BYTES // 6))
            os.pwritev(descriptor, [page], 0)
            os.preadv(descriptor, [page], 0)
    finally:
        os.close(descriptor)


def try_direct(folder: Path) -> Finding:
    try:
        descriptor, name = tempfile.mkstemp(prefix=".dynamo-doctor-", dir=folder)
    except OSError as error:
        remedy = f"chown or chmod {folder} for this user, or choose another --kvbm-nvme-path"
        return Finding(Level.FAIL, NAME, f"cannot write in {folder}: {error.strerror}", remedy)
    os.close(descriptor)
    try:
        write_directly(Path(name))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return Finding(Level.FAIL, NAME, f"{folder} is full", "free space there")
        remedy = "use ext4 or XFS on a local disk"
        return Finding(Level.WARN, NAME, f"{folder} takes no direct I/O ({error.strerror}): slower", remedy)
    finally:
        os.unlink(name)
    return Finding(Level.OK, NAME, f"{folder} is writable, with direct I/O")


def judge_space(folder: Path, free_bytes: int, wanted_gb: float | None) -> Finding:
    name, detail = f"{NAME} space", f"{in_gb(free_bytes)} free or in slabs in {folder}"
    wanted_bytes = (wanted_gb if wanted_gb is not None else 1.0) * GIGABYTE
    if free_bytes < wanted_bytes:
        remedy = "free space there, or choose a smaller --kvbm-nvme-gb or another --kvbm-nvme-path"
        return Finding(Level.FAIL, name, f"{detail}, {in_gb(wanted_bytes)} wanted", remedy)
    return Finding(Level.OK, name, detail)


def examine_nvme(folder: Path | None, wanted_gb: float | None) -> list[Finding]:
    if folder is None:
        return []
    if not folder.is_dir():
        if folder.exists():
            return [Finding(Level.FAIL, NAME, f"{folder} is not a directory", "name a directory in --kvbm-nvme-path")]
        return [Finding(Level.FAIL, NAME, f"{folder} does not exist", f"mount its disk, or mkdir -p {folder}")]
    written = try_direct(folder)
    if written.level is Level.FAIL:
        return [written]
    return [written, judge_space(folder, slab_room_bytes(folder), wanted_gb)]
