"""`dynamo-connectors` as a user starts it: exit codes, one screen, JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_connectors import __version__
from dynamo_connectors.doctor.finding import Finding, Level
from dynamo_connectors.doctor.report import as_json, summary
from tests.house.repository import import_path

MAIN = "from dynamo_entrypoints.connectors_cli import main; main()"


def start(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": import_path(), "COLUMNS": "100", **variables}
    command = [sys.executable, "-c", MAIN, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def test_version() -> None:
    result = start("version")
    assert (result.returncode, result.stdout) == (0, f"{__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["doctor", "--nonsense"], ["doctor", "--kvbm-host-dram-gb", "lots"], ["doctor", "extra"]],
)
def test_bad_usage_is_one_message_and_exit_2(arguments: list[str]) -> None:
    result = start(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr


def test_red_lines_mean_exit_1(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    result = start("doctor", "--kvbm-nvme-path", str(missing), VLLM_PLUGINS="other")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert f"mkdir -p {missing}" in result.stdout.replace("\n", "").replace("  ", "") or "mkdir" in result.stdout
    assert "VLLM_PLUGINS" in result.stdout
    assert len(result.stdout.splitlines()) <= 50, "more than one screen"


def test_a_healthy_machine_means_exit_0(tmp_path: Path) -> None:
    result = start("doctor", "--json", "--kvbm-nvme-path", str(tmp_path), "--kvbm-host-dram-gb", "0.01")
    report = json.loads(result.stdout)
    failed = [finding for finding in report["findings"] if finding["level"] == "fail"]
    assert failed == []
    assert report["healthy"] is True
    assert result.returncode == 0


def test_json_holds_every_field() -> None:
    findings = [Finding(Level.OK, "a", "b"), Finding(Level.FAIL, "c", "d", "e")]
    report = json.loads(as_json(findings))
    assert report["healthy"] is False
    assert report["findings"][1] == {"level": "fail", "name": "c", "detail": "d", "remedy": "e"}
    assert summary(findings) == "1 ok, 1 fail"
