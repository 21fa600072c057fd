"""The two fixtures around every test: nothing may leak, and every stateful object must pass its own `check()`.

Both are set up before a test's other function fixtures and torn down after them, so what those fixtures open and
close is judged too. What a module or session fixture holds was there before and is nobody's leak.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.house import leaks
from tests.house.invariants import Recorder
from tests.house.repository import PACKAGES

RECORDER = Recorder(tuple(PACKAGES))


def pytest_configure() -> None:
    RECORDER.watch_imports()


def pytest_sessionstart() -> None:
    leaks.start_permanent_helpers()


def pytest_unconfigure() -> None:
    if RECORDER in sys.meta_path:
        sys.meta_path.remove(RECORDER)


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    before = leaks.Snapshot.take()
    yield
    leaked = leaks.wait_for_release(before)
    if leaked:
        pytest.fail("the test leaked:\n  " + "\n  ".join(leaked), pytrace=False)


@pytest.fixture(autouse=True)
def invariants_hold(nothing_leaks: None) -> Iterator[None]:
    RECORDER.begin()
    yield
    broken = RECORDER.finish()
    if broken:
        pytest.fail("check() found a broken invariant:\n  " + "\n  ".join(broken), pytrace=False)
