"""Every test leaves as few descriptors and threads as it found."""

import asyncio
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop
from hypothesis import HealthCheck, settings


# The machine is shared: a slow example says nothing.
settings.register_profile("proxy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("proxy")


@pytest.fixture(scope="session", autouse=True)
def _loop_library_is_loaded() -> None:
    """libuv opens one signal pipe per process, at its first loop, and keeps it."""
    uvloop.run(asyncio.sleep(0))


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    threads = set(threading.enumerate())
    files = _open_files()
    yield
    gc.collect()
    new = {number: name for number, name in _open_files().items() if number not in files}
    assert not new, f"descriptors left open: {new}"
    assert not set(threading.enumerate()) - threads, "threads left running"


def _open_files() -> dict[str, str]:
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            name = os.readlink(entry)
        except OSError:
            continue
        if not name.startswith(("/proc", "/dev/urandom")):
            found[entry.name] = name
    return found
