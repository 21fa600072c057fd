"""SGLang's own manager, sender, receiver and bootstrap server on our transport: the cases of `handoff_classes`."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.house.repository import ROOT, environment
from tests.sglang.handoff_classes import CASES
from tests.sglang.server import server_environment
from tools.server_process import free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    command = [str(environment("sglang") / "bin" / "python"), "-m", "tests.sglang.handoff_classes", str(free_port())]
    ran = subprocess.run(command, env=server_environment(), cwd=ROOT, capture_output=True, text=True, timeout=800)
    results = [line for line in ran.stdout.splitlines() if line.startswith("RESULTS ")]
    assert results, f"no results:\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
    found: dict[str, str] = json.loads(results[0].removeprefix("RESULTS "))
    return found


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_classes_of_the_engine(outcomes: dict[str, str], case: str) -> None:
    assert outcomes[case] == ""
