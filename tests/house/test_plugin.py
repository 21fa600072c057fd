"""The fixtures around every test, shown to fail what they must fail: one inner pytest run over tests that misbehave."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.house.repository import import_path

SETTINGS = "[pytest]\naddopts = -p tests.house.plugin\n"

# A package under one of our names, so that the recorder instruments it.
PACKAGE = '''
class Shelf:
    """Its invariant: nothing on it is negative."""

    def __init__(self):
        self.items = []

    def check(self):
        assert all(item >= 0 for item in self.items), "an item is negative"


class TallShelf(Shelf):
    def __init__(self):
        super().__init__()
        self.height = 2

    def check(self):
        super().check()
        assert self.height > 0, "no height"


class Named:
    def __new__(cls, name):
        made = super().__new__(cls)
        made.name = name
        return made

    def check(self):
        assert self.name, "no name"


class Plain:
    def check(self):
        raise RuntimeError("cannot even look")
'''

TESTS = """
import os, subprocess, sys, threading
from multiprocessing import shared_memory
import pytest

KEPT = []

@pytest.fixture(scope="module")
def engine():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    thread = threading.Thread(target=child.wait, name="watcher")
    thread.start()
    yield child
    child.kill()
    thread.join()

@pytest.fixture(scope="module")
def old_shelf():
    from dynamo_planner.shelf import Shelf
    return Shelf()

def test_ok(engine):
    with open(os.devnull):
        assert engine.poll() is None

def test_ok_when_closing_takes_a_moment():
    thread = threading.Thread(target=threading.Event().wait, args=(0.3,))
    thread.start()

def test_leaks_thread():
    stop = threading.Event()
    threading.Thread(target=stop.wait, args=(20,), name="lost-thread", daemon=True).start()

def test_leaks_process():
    KEPT.append(subprocess.Popen(["sleep", "30.25"]))

def test_leaks_orphan():
    subprocess.run(["sh", "-c", "sleep 30.75 & disown 2>/dev/null || true"], stdout=subprocess.DEVNULL)

def test_leaks_descriptor(tmp_path):
    os.open(tmp_path / "lost-file", os.O_CREAT | os.O_RDWR)

def test_leaks_segment():
    segment = shared_memory.SharedMemory(create=True, size=4096, name=f"lost-segment-{os.getpid()}")
    KEPT.append(segment)
    segment.close()

def test_unlinks_it():
    KEPT.pop().unlink()

def test_fails_check_on_a_dropped_object():
    from dynamo_planner.shelf import Shelf
    Shelf().items.append(-1)

def test_fails_check_of_a_subclass():
    from dynamo_planner.shelf import TallShelf
    TallShelf().height = 0

def test_fails_check_without_constructor():
    from dynamo_planner.shelf import Plain
    Plain()

def test_fails_check_after_new():
    from dynamo_planner.shelf import Named
    Named("")

def test_ok_named():
    from dynamo_planner.shelf import Named
    Named("n")

def test_fails_check_when_many_were_made():
    from dynamo_planner.shelf import Shelf
    for number in range(1000):
        Shelf().items.append(number - 500 if number == 3 else number)
    from tests.house.plugin import RECORDER
    assert len(RECORDER.made) < 200

def test_ok_before_it_breaks(old_shelf):
    pass

def test_fails_check_of_a_module_fixture(old_shelf):
    old_shelf.items.append(-5)

def test_ok_once_repaired(old_shelf):
    old_shelf.items.clear()
"""


@pytest.fixture(scope="module")
def inner_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("inner")
    package = folder / "dynamo_planner"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "shelf.py").write_text(PACKAGE)
    (folder / "pytest.ini").write_text(SETTINGS)
    (folder / "test_inner.py").write_text(TESTS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        "-c",
        "pytest.ini",
        "test_inner.py",
    ]
    path = f"{folder}:{import_path()}"
    result = subprocess.run(
        command,
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.stdout + result.stderr


@pytest.mark.parametrize(
    ("test", "words"),
    [
        ("test_leaks_thread", "daemon thread 'lost-thread'"),
        ("test_leaks_process", "sleep 30.25"),
        ("test_leaks_orphan", "sleep 30.75"),
        ("test_leaks_descriptor", "lost-file"),
        ("test_leaks_segment", "shared-memory segment /dev/shm/lost-segment"),
        (
            "test_fails_check_on_a_dropped_object",
            "dynamo_planner.shelf.Shelf: AssertionError: an item is negative",
        ),
        ("test_fails_check_of_a_subclass", "dynamo_planner.shelf.TallShelf: AssertionError: no height"),
        (
            "test_fails_check_without_constructor",
            "dynamo_planner.shelf.Plain: RuntimeError: cannot even look",
        ),
        ("test_fails_check_after_new", "dynamo_planner.shelf.Named: AssertionError: no name"),
        (
            "test_fails_check_when_many_were_made",
            "dynamo_planner.shelf.Shelf: AssertionError: an item is negative",
        ),
        (
            "test_fails_check_of_a_module_fixture",
            "dynamo_planner.shelf.Shelf: AssertionError: an item is negative",
        ),
    ],
)
def test_misbehaviour_fails(inner_run: str, test: str, words: str) -> None:
    assert f"test_inner.py::{test} ERROR" in inner_run, inner_run
    section = inner_run.split(f"ERROR at teardown of {test} ")[1].split("ERROR at teardown of")[0]
    assert words in section


def test_good_tests_pass(inner_run: str) -> None:
    errors = set(re.findall(r"::(\w+) ERROR", inner_run))
    failures = set(re.findall(r"::(\w+) FAILED", inner_run))
    assert not {name for name in errors if name.startswith("test_ok")}, inner_run
    assert not failures, inner_run
