"""The compiled wheel: the same package, and the proxy's hardest tests on what users of it run."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.house.repository import ROOT

pytestmark = pytest.mark.timeout(1100)

TESTS = ("chaos", "http1", "data_plane", "resume", "failures", "disaggregation", "explain", "engines", "kv", "workers")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled wheel."""
    folder = tmp_path_factory.mktemp("compiled")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    environment = {**os.environ, "DYNAMO_COMPILE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, f"no C compiler, or no Python.h beside it?\n{done.stdout}{done.stderr}"
    (built,) = folder.glob("*.whl")
    return built


def test_it_is_the_pure_wheel_and_compiled_modules(wheel: Path, compiled: Path) -> None:
    assert "-none-any" in wheel.name
    assert "-none-any" not in compiled.name
    with zipfile.ZipFile(wheel) as pure, zipfile.ZipFile(compiled) as both:
        added = set(both.namelist()) - set(pure.namelist())
        assert set(pure.namelist()) <= set(both.namelist())
        assert all(name.endswith(".so") for name in added)
        same = [name for name in pure.namelist() if name.endswith(".py")]
        assert all(pure.read(name) == both.read(name) for name in same)


def test_the_proxys_tests_pass_on_it(compiled: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(compiled) as archive:
        archive.extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    where = [sys.executable, "-c", "import dynamo_proxy.exchange as module; print(module.__file__)"]
    found = subprocess.run(where, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(tmp_path))
    assert found.strip().endswith(".so")
    files = [f"tests/proxy/test_proxy_{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
