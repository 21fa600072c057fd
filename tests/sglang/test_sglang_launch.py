"""Launches through SGLang's own parser: what is accepted, and the one line for what is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dynamo_connectors.errors import PluginError
from dynamo_connectors.sglang import compat, plugin
from dynamo_connectors.sglang.settings import WORKERS_KEY
from tests.sglang.server import launch_command, server_environment

_SECONDS = 300
_DYNAMO = ["--enable-hierarchical-cache", "--hicache-storage-backend", "dynamo"]
_ENGINE = {"enable_hierarchical_cache": True, "hicache_storage_backend": "dynamo"}

Outcome = dict[str, Any]


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A real launch of a model that is not there: whoever tries to load it fails otherwise than we expect."""
    return _run(launch_command(Path("/no/such/model"), "--port", "1", *arguments), "", **environment)


def _run(command: list[str], given: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=server_environment(**environment),
        input=given,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )


def the_line(ended: subprocess.CompletedProcess[str]) -> str:
    """The one line of ours; SGLang's own start-up chatter about this machine is not ours to judge."""
    assert ended.returncode == 2, ended.stderr[-2000:]
    assert "Traceback" not in ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("dynamo: ")]
    return line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launches")
    (folder / "kv").mkdir()
    return folder


def _cases(folder: Path) -> dict[str, list[str] | dict[str, object]]:
    kv = ["--kvbm-nvme-path", str(folder / "kv")]
    extra = "--hicache-storage-backend-extra-config"
    config = folder / "sglang.yaml"
    config.write_text(
        f"enable-hierarchical-cache: true\nhicache-storage-backend: dynamo\nkvbm-nvme-path: {folder}/kv\n"
    )
    nan = folder / "nan.yaml"
    nan.write_text(config.read_text() + "kvbm-nvme-gb: .nan\n")
    settings = folder / "extra.yaml"
    settings.write_text(f"kvbm_nvme_path: {folder}/kv\nkvbm_nvme_gb: 0.1\n")
    cases = {
        "accepted": [*_DYNAMO, *kv, "--kvbm-nvme-gb", "0.5"],
        "shared": [*_DYNAMO, *kv, "--kvbm-nvme-gb", "0.5", "--tp-size", "2", "--dp-size", "3"],
        "by config file": ["--config", str(config)],
        "by settings file": [*_DYNAMO, extra, f"@{settings}"],
        "without us": ["--enable-hierarchical-cache", "--hicache-storage-backend", "file"],
        "no path": _DYNAMO,
        "not there": [*_DYNAMO, "--kvbm-nvme-path", "/proc/kv"],
        "not writable": [*_DYNAMO, "--kvbm-nvme-path", "/proc"],
        "no space": [*_DYNAMO, *kv, "--kvbm-nvme-gb", "0"],
        "negative": [*_DYNAMO, *kv, "--kvbm-nvme-gb=-3"],
        "too much": [*_DYNAMO, *kv, "--kvbm-nvme-gb", "1e9"],
        "nan by config file": ["--config", str(nan)],
        "not asked for": kv,
        "no hierarchical cache": ["--hicache-storage-backend", "dynamo", *kv],
        "unknown setting": [*_DYNAMO, *kv, extra, '{"kvbm_host_dram_gb": 1}'],
        "not json": [*_DYNAMO, *kv, extra, "kvbm"],
    }
    handoff = ["--disaggregation-transfer-backend", "dynamo", "--disaggregation-mode"]
    cases |= {
        "hand-off without mode": handoff[:2],
        "hand-off soon": [*handoff, "decode", "--kvbm-peer-deadline-ms", "soon"],
        "hand-off of stages": [*handoff, "prefill", "--pp-size", "2"],
        "hand-off not asked for": ["--kvbm-peer-deadline-ms", "5000"],
    }
    launches = {name: ["--model-path", "/no/such/model", *arguments] for name, arguments in cases.items()}
    engine_extra = json.dumps({"kvbm_nvme_path": str(folder / "kv"), "kvbm_nvme_gb": 0.1})
    return {
        **launches,
        "engine": {**_ENGINE, "hicache_storage_backend_extra_config": engine_extra},
        "engine without path": dict(_ENGINE),
    }


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    cases = _cases(folder)
    script = Path(__file__).with_name("launch_cases.py")
    done = _run([launch_command(folder)[0], str(script)], json.dumps(list(cases.values())))
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")] or [done.stderr[-3000:]]
    return dict(zip(cases, json.loads(line.removeprefix("RESULTS ")), strict=True))


@pytest.mark.engine
@pytest.mark.parametrize(
    ("case", "size_gb", "workers"),
    [("accepted", "0.5", 1), ("shared", "0.5", 6), ("by config file", None, 1), ("by settings file", 0.1, 1)],
)
def test_a_good_launch_becomes_the_dynamic_backend(
    outcomes: dict[str, Outcome], folder: Path, case: str, size_gb: object, workers: int
) -> None:
    outcome = outcomes[case]
    assert outcome["code"] is None, outcome
    assert outcome["backend"] == "dynamic"
    extra = outcome["extra"]
    assert (extra["backend_name"], extra["class_name"], extra["interface_v1"]) == ("dynamo", "DynamoHiCache", 1)
    assert extra["kvbm_nvme_path"] == str(folder / "kv")
    assert extra.get("kvbm_nvme_gb") == size_gb
    assert extra[WORKERS_KEY] == workers


@pytest.mark.engine
def test_a_launch_without_us_stays_as_it_was(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["without us"] == {"code": None, "backend": "file", "extra": {}}


@pytest.mark.engine
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no path", "needs --kvbm-nvme-path"),
        ("not there", "--kvbm-nvme-path /proc/kv does not exist"),
        ("not writable", "--kvbm-nvme-path /proc cannot be used"),
        ("no space", "--kvbm-nvme-gb 0 must be"),
        ("negative", "--kvbm-nvme-gb -3 must be"),
        ("too much", "GB free in"),
        ("nan by config file", "--kvbm-nvme-gb nan must be"),
        ("not asked for", "--kvbm-nvme-path needs --hicache-storage-backend dynamo"),
        ("no hierarchical cache", "needs --enable-hierarchical-cache"),
        ("unknown setting", "kvbm_host_dram_gb"),
        ("not json", "cannot be parsed"),
        ("hand-off without mode", "needs --disaggregation-mode prefill or decode"),
        ("hand-off soon", "--kvbm-peer-deadline-ms 'soon' must be a number"),
        ("hand-off of stages", "--pp-size 1 only"),
        ("hand-off not asked for", "needs --disaggregation-transfer-backend dynamo"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(outcomes: dict[str, Outcome], case: str, words: str) -> None:
    outcome = outcomes[case]
    assert outcome["code"] == 2
    (line,) = outcome["stderr"].splitlines()
    assert line.startswith("dynamo: ")
    assert words in line


@pytest.mark.engine
def test_the_engine_class_takes_us_too(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["engine"] == {"error": None, "backend": "dynamic"}
    assert "needs --kvbm-nvme-path" in outcomes["engine without path"]["error"]


@pytest.mark.engine
@pytest.mark.timeout(_SECONDS)
def test_a_mistake_stops_a_real_launch() -> None:
    assert "/proc/kv does not exist" in the_line(launch(*_DYNAMO, "--kvbm-nvme-path", "/proc/kv"))


@pytest.mark.engine
@pytest.mark.timeout(_SECONDS)
@pytest.mark.parametrize(
    ("drift", "missing"),
    [
        ("choices", "--hicache-storage-backend dynamic"),
        ("sglang.srt.server_args:ServerArgs.from_cli_args", "server_args.ServerArgs.from_cli_args"),
        ("sglang.srt.managers.scheduler:Scheduler.flush_cache", "managers.scheduler.Scheduler.flush_cache"),
    ],
)
def test_a_version_that_lacks_what_we_need_stops_the_launch(tmp_path: Path, drift: str, missing: str) -> None:
    line = the_line(launch(*_DYNAMO, "--kvbm-nvme-path", str(tmp_path), DYNAMO_TEST_DRIFT=drift))
    assert f"SGLang 0.5.23 does not offer {missing}" in line
    assert "SGLang 0.5.14 to 0.5.23" in line


@pytest.mark.engine
@pytest.mark.timeout(_SECONDS)
def test_whoever_does_not_ask_for_us_is_not_disturbed_by_drift() -> None:
    ended = launch(DYNAMO_TEST_DRIFT="choices")
    assert not [line for line in ended.stderr.splitlines() if line.startswith("dynamo: ")]
    assert "/no/such/model" in ended.stderr, "SGLang itself should have missed the model"


@pytest.mark.engine
@pytest.mark.timeout(_SECONDS)
def test_a_plugin_that_is_switched_off_is_refused_by_sglang() -> None:
    ended = launch(*_DYNAMO, SGLANG_PLUGINS="a_test_stand_ins")
    assert ended.returncode == 2
    assert "invalid choice: 'dynamo'" in ended.stderr


@pytest.fixture
def no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise compat.drift("plugins.hook_registry")

    monkeypatch.setattr(compat, "hook_registry", missing)


@pytest.mark.usefixtures("no_hooks")
def test_without_hooks_the_plugin_stops_who_asks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sglang", *_DYNAMO])
    with pytest.raises(SystemExit) as stopped:
        plugin.install()
    assert stopped.value.code == 2
    assert "does not offer plugins.hook_registry" in capsys.readouterr().err


@pytest.mark.usefixtures("no_hooks")
def test_without_hooks_the_plugin_leaves_others_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["sglang", "--model-path", "m"])
    plugin.install()
    assert capsys.readouterr().err == ""
    assert caplog.text.count("the plugin is off") == 1


def test_a_path_that_is_not_there_is_drift() -> None:
    assert compat.resolve("dynamo_connectors.errors.PluginError.with_traceback")
    for path in ("dynamo_connectors.errors.NoSuchError", "dynamo_connectors.nothing.Error"):
        with pytest.raises(PluginError, match="does not offer"):
            compat.resolve(path)
