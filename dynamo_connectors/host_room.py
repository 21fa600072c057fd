"""What this machine has for the tiers: memory, and room in the directory of the slabs.

The start of an engine and the doctor ask the same functions, so that they never disagree.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from dynamo_connectors.errors import ConfigError


def memory_bytes() -> int:
    """Of this host, or of its control group where that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = container_limit_bytes()
    return physical if limit is None else min(physical, limit)


def container_limit_bytes(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The memory limit of this control group (version 2 or 1), None without one."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (root / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 2**60:
            return int(text)
    return None


def refuse_unusable(directory: Path) -> None:
    """Raises `ConfigError` unless `directory` is there and takes files.

    It is never made: where a disk is not mounted, slabs would fill the disk of the system instead.
    """
    try:
        if not directory.exists():
            raise ConfigError(f"--kvbm-nvme-path {directory} does not exist; mount its disk, or mkdir -p {directory}")
        with tempfile.TemporaryFile(dir=directory):
            return
    except OSError as error:
        raise ConfigError(
            f"--kvbm-nvme-path {directory} cannot be used ({error.strerror}); name a directory this user may write to"
        ) from error


def slab_room_bytes(directory: Path) -> int:
    """What is free there, and what slabs hold: those of engines that have died are taken over or make room."""
    return shutil.disk_usage(directory).free + sum(_disk_bytes(path) for path in directory.glob("kvbm-*.slab"))


def _disk_bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:  # its engine has just closed it
        return 0
