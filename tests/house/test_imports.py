"""Importing a package of ours stays light: no torch, no engine, few modules. `benchmarks/import_time.py` times it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.house.repository import PACKAGES, import_path

HEAVY = {
    *("torch", "triton", "vllm", "sglang", "nixl", "nixl_cu12", "nixl_cu13", "transformers", "tokenizers"),
    *("scipy", "pandas", "numba", "boto3", "kr8s", "matplotlib", "openai"),
}
# Above what the interpreter itself loads (its .pth files included): typer, pydantic and numpy each cost about 200.
MOST_MODULES = 300


def modules_after(statement: str) -> set[str]:
    """Names in sys.modules of a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys; sys.stdout.write(chr(10).join(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": import_path()}
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout
    return set(output.split())


@pytest.fixture(scope="module")
def floor() -> set[str]:
    return modules_after("pass")


@pytest.mark.parametrize("package", PACKAGES)
def test_import_is_light(package: str, floor: set[str]) -> None:
    loaded = modules_after(f"import {package}") - floor
    assert package in loaded
    assert not {name.split(".")[0] for name in loaded} & HEAVY
    assert len(loaded) <= MOST_MODULES


def test_the_console_commands_load_no_engine(floor: set[str]) -> None:
    loaded = modules_after("import dynamo_entrypoints.connectors_cli") - floor
    assert not {name.split(".")[0] for name in loaded} & HEAVY
