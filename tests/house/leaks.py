"""What a test may leave behind: nothing. Threads, processes, descriptors and shared memory, compared with before.

A child that has exited is no leak even if nobody waited for it. Descendants of what a higher fixture holds are that
fixture's business. A shared-memory segment that only processes outside this run map belongs to them.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path

import obstore
import psutil
import uvloop
from obstore.store import MemoryStore

GRACE_SECONDS = 2.0
SHARED_MEMORY = Path("/dev/shm")
PR_SET_CHILD_SUBREAPER = 36

# Threads that a library starts once per process and offers no way to stop. Each needs its reason.
PERMANENT_THREADS = {
    "tqdm.TMonitor": "tqdm's progress monitor, one per process, wakes every 10 s and ends with it",
}


def start_permanent_helpers() -> None:
    """Puts what is opened once per process into every baseline, and adopts orphans so that they are seen."""
    resource_tracker.ensure_running()
    uvloop.new_event_loop().close()  # libuv keeps one pipe for signals, from its first loop on
    asyncio.run(_start_obstore())  # its Rust runtime keeps threads and an epoll for the life of the process
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


async def _start_obstore() -> None:
    await obstore.put_async(MemoryStore(), "first", b"")


@dataclass
class Snapshot:
    """Each resource that exists now: its identity -> the words that name it in a failure."""

    threads: dict[Hashable, str] = field(default_factory=dict)
    processes: dict[Hashable, str] = field(default_factory=dict)
    descriptors: dict[Hashable, str] = field(default_factory=dict)
    segments: dict[Hashable, str] = field(default_factory=dict)

    @classmethod
    def take(cls) -> Snapshot:
        return cls(live_threads(), child_processes(), open_descriptors(), shared_segments())

    def new_since(self, before: Snapshot) -> list[str]:
        """Names of what is here and was not before."""
        names: list[str] = []
        for kind in ("threads", "processes", "descriptors"):
            old, new = getattr(before, kind), getattr(self, kind)
            names += [text for identity, text in new.items() if identity not in old]
        fresh = {name: text for name, text in self.segments.items() if name not in before.segments}
        foreign = segments_of_others({str(name) for name in fresh}) if fresh else set()
        return names + [text for name, text in fresh.items() if name not in foreign]


def live_threads() -> dict[Hashable, str]:
    found: dict[Hashable, str] = {}
    for thread in threading.enumerate():
        kind = f"{type(thread).__module__.split('.')[0]}.{type(thread).__name__}"
        if kind not in PERMANENT_THREADS:
            daemon = "daemon thread" if thread.daemon else "thread"
            found[thread] = f"{daemon} {thread.name!r} ({kind})"
    return found


def child_processes() -> dict[Hashable, str]:
    found: dict[Hashable, str] = {}
    for child in psutil.Process().children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE:
                found[child] = f"process {child.pid}: {' '.join(child.cmdline())[:200] or child.name()}"
        except psutil.Error:
            continue
    return found


def without_descendants_of(held: dict[Hashable, str], now: dict[Hashable, str]) -> dict[Hashable, str]:
    """`now` less the processes that a process in `held` started."""
    kept: dict[Hashable, str] = {}
    for child, text in now.items():
        assert isinstance(child, psutil.Process)
        try:
            owned = child not in held and any(parent in held for parent in child.parents())
        except psutil.Error:
            continue
        if not owned:
            kept[child] = text
    return kept


def open_descriptors() -> dict[Hashable, str]:
    found: dict[Hashable, str] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the descriptor of this very listing
            continue
        found[name, target] = f"file descriptor {name} -> {target}"
    return found


def shared_segments() -> dict[Hashable, str]:
    found: dict[Hashable, str] = {}
    if SHARED_MEMORY.is_dir():
        for path in SHARED_MEMORY.rglob("*"):
            found[str(path)] = f"shared-memory segment {path}"
    system_v = Path("/proc/sysvipc/shm")
    if system_v.is_file():
        for line in system_v.read_text().splitlines()[1:]:
            columns = line.split()
            if int(columns[4]) == os.getpid():
                found[f"sysv {columns[1]}"] = f"System V shared-memory segment {columns[1]}, {columns[3]} bytes"
    return found


def segments_of_others(paths: set[str]) -> set[str]:
    """Those of `paths` that some process outside this run maps or holds open, and none inside it."""
    files = {path: file for path in paths if (file := file_identity(path)) is not None}
    ours = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    mine: set[tuple[int, int]] = set()
    theirs: set[tuple[int, int]] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            used = set(files.values()) & files_used_by(entry)
            (mine if int(entry.name) in ours else theirs).update(used)
    return {path for path, file in files.items() if file in theirs - mine}


def file_identity(path: str | Path) -> tuple[int, int] | None:
    """(device, inode). Names mislead: a semaphore is mapped under the temporary name that it was made with."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def files_used_by(process: Path) -> set[tuple[int, int]]:
    used: set[tuple[int, int]] = set()
    try:
        for line in (process / "maps").read_text().splitlines():
            _, _, _, device, inode, *_ = line.split(maxsplit=5)
            major, minor = (int(part, 16) for part in device.split(":"))
            used.add((os.makedev(major, minor), int(inode)))
        used.update(filter(None, map(file_identity, (process / "fd").iterdir())))
    except OSError:  # it ended, or is another user's
        pass
    return used


def wait_for_release(before: Snapshot, grace_seconds: float = GRACE_SECONDS) -> list[str]:
    """Names what is still there after the grace: closing is often finished by another thread."""
    deadline = time.monotonic() + grace_seconds
    pause_seconds = 0.005
    while True:
        now = Snapshot.take()
        now.processes = without_descendants_of(before.processes, now.processes)
        leaked = now.new_since(before)
        if not leaked or time.monotonic() > deadline:
            return leaked
        gc.collect()
        time.sleep(pause_seconds)
        pause_seconds = min(pause_seconds * 2, 0.1)
