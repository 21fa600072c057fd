"""The connector on the oldest and the newest vLLM that it supports, and on the one that the rest of the suite runs.

Each in an interpreter of its own: flags, factory, scheduler and worker-side call order are that version's own, only the
model is made up (`simulated_engine`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

ROOT = Path(__file__).resolve().parents[2]
#: Version -> what `make test` puts before the environment's own vLLM (tools/bootstrap.py); None for that one itself.
OVERLAYS = {"0.24.0": "vllm-0.24", "0.32.0": None, "0.33.0": "vllm-0.33"}


def child_environment(overlay: str | None) -> dict[str, str]:
    paths = [entry for entry in sys.path if entry and "site-packages" not in entry]
    if overlay is not None:
        folder = Path(sys.prefix).parent / overlay
        assert folder.is_dir(), f"{folder} is not there; `make test` builds it"
        paths.append(str(folder))
    settings = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **settings, "PYTHONPATH": os.pathsep.join([str(ROOT), *paths])}


# Most of a minute on an idle machine, half of it imports.
@pytest.mark.timeout(600)
@pytest.mark.parametrize("program", ["version_scenario", "beside_others"])
@pytest.mark.parametrize("version", OVERLAYS)
def test_a_version_runs_the_whole_scenario(version: str, program: str, tiny_model: Path) -> None:
    command = [sys.executable, "-m", f"tests.vllm.{program}", str(tiny_model)]
    environment = child_environment(OVERLAYS[version])
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580, check=False)
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    lines = run.stdout.splitlines()
    assert f"vllm {version}" in lines
    assert lines[-1] == "passed: everything"
