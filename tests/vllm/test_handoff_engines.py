"""Prefill on one engine and decode on another, real transports between them, with and without faults."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.repository import ROOT

pytest.importorskip("vllm")


# In an interpreter of its own: NIXL keeps threads and descriptors for the life of a process. Half of it is imports.
def last_line(scenario: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"tests.vllm.{scenario}", *arguments]
    settings = {"VLLM_LOGGING_LEVEL": "ERROR", "NIXL_LOG_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(ROOT), *(entry for entry in sys.path if entry and "site-packages" not in entry)])
    environment = {**os.environ, **settings, "PYTHONPATH": paths}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580, check=False)
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    return run.stdout.splitlines()[-1]


@pytest.mark.timeout(600)
def test_answers_are_right_with_and_without_faults(tiny_model: Path) -> None:
    assert last_line("handoff_scenario", str(tiny_model), "60") == "ok: 60 requests with faults, no wrong byte"


@pytest.mark.timeout(600)
def test_answers_are_right_with_unequal_tensor_parallelism(tiny_model: Path) -> None:
    assert last_line("divided_scenario", str(tiny_model)) == "ok: no wrong byte"
