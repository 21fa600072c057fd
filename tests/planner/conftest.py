"""Every planner test ends with no child process, thread or file descriptor more than it began with."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


def _children() -> set[str]:
    tasks = Path("/proc/self/task")
    return {pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()}


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    gc.collect()
    children, threads, files = _children(), set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert _children() <= children, "a child process is left"
    assert set(threading.enumerate()) <= threads, "a thread is left"
    assert len(os.listdir("/proc/self/fd")) <= files, "a file descriptor is left"
