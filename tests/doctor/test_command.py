"""`dynamo-connectors` as a user starts it: exit codes, one screen, JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_connectors import __version__
from dynamo_connectors.config import SETTINGS, flag_of
from dynamo_connectors.doctor.finding import Finding, Level
from dynamo_connectors.doctor.report import as_json, summary
from tests.doctor.test_probes import write_distribution
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


@pytest.mark.parametrize(
    "arguments",
    [["--kvbm-object-url", "http://foo/bar"], ["--kvbm-host-dram-gb", "lots"], ["--kvbm-compression", "fp9", "--json"],
     ["--kvbm-peer-secret-file", "/none", "--kvbm-role", "prefill"]],
)  # fmt: skip
def test_a_wrong_value_ends_it_before_any_probe(arguments: list[str]) -> None:
    result = start("doctor", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert arguments[0] in result.stderr


def test_help_lists_every_flag_of_the_engine() -> None:
    text = start("doctor", "--help").stdout
    assert [flag_of(setting) for setting in SETTINGS if f"{flag_of(setting)} " not in text] == []


def test_what_is_known_at_once_is_printed_while_an_engine_is_still_asked(tmp_path: Path) -> None:
    """Into a pipe, which nobody flushes for it. The plugin here never ends."""
    write_distribution(tmp_path, "dynamo-connectors", "9.9", "[vllm.general_plugins]\ndynamo = signal:pause\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{import_path()}", "COLUMNS": "200"}
    missing = str(tmp_path / "none")
    command = [sys.executable, "-c", MAIN, "doctor", "--kvbm-nvme-path", missing]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as doctor:
        try:
            assert doctor.stdout is not None
            lines = []
            for line in doctor.stdout:
                lines.append(line)
                if "GPU" in line:
                    break
            is_running = doctor.poll() is None
        finally:
            os.killpg(doctor.pid, signal.SIGKILL)
    assert is_running
    assert lines[0].split()[1] == "memory"
    assert any(f"{missing} does not exist" in line for line in lines)
    assert not any("plugin" in line for line in lines)


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
