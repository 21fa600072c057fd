"""Every planner test ends with no child process, thread or file descriptor more than it began with."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


def _children() -> set[str]:
    """Children that run. Killed orphans may come to us as zombies: the suite may be a child subreaper."""
    tasks = Path("/proc/self/task")
    pids = {pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()}
    return {pid for pid in pids if _state(pid) not in "ZX"}


def _state(pid: str) -> str:
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _held() -> tuple[set[str], set[threading.Thread], int]:
    return _children(), set(threading.enumerate()), len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    children, threads, files = _held()
    yield
    now = _held()
    if not (now[0] <= children and now[1] <= threads and now[2] <= files):
        gc.collect()  # only on suspicion: it costs more than most of these tests
        now = _held()
    assert now[0] <= children, "a child process is left"
    assert now[1] <= threads, "a thread is left"
    assert now[2] <= files, "a file descriptor is left"
