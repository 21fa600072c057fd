"""The wheel, built once, and the two environments it is put into: a clean one, and one beside a locked engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.repository import ROOT, environment


def run(*command: str | Path, timeout_seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs a command outside the checkout's import path; the result holds its text."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(
        [str(part) for part in command],
        env=clean,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
    )


def succeed(*command: str | Path, timeout_seconds: float = 300) -> str:
    result = run(*command, timeout_seconds=timeout_seconds)
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


def new_venv(folder: Path) -> Path:
    """Returns the interpreter of a fresh environment in `folder`."""
    succeed(sys.executable, "-m", "venv", folder)
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with our wheel and what it depends on, from the registry, and nothing else."""
    python = new_venv(tmp_path_factory.mktemp("clean"))
    succeed(python, "-m", "pip", "install", "--no-compile", wheel, timeout_seconds=280)
    return python


def beside(engine: str, wheel: Path, folder: Path) -> Path:
    """An environment that sees the locked engine's packages and has our wheel, not the editable install."""
    python = new_venv(folder)
    succeed(python, "-m", "pip", "install", "--no-compile", "--no-deps", wheel)
    (engine_packages,) = (environment(engine) / "lib").glob("python*/site-packages")
    (ours,) = (folder / "lib").glob("python*/site-packages")
    # A plain path line: .pth files inside that folder, our editable finder among them, are not read.
    (ours / "engine.pth").write_text(f"{engine_packages}\n")
    return python


@pytest.fixture(scope="session")
def beside_vllm(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return beside("vllm", wheel, tmp_path_factory.mktemp("beside-vllm"))


@pytest.fixture(scope="session")
def beside_sglang(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return beside("sglang", wheel, tmp_path_factory.mktemp("beside-sglang"))
