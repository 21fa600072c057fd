"""The wheel where users put it: alone in a clean environment, and beside the locked engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.house.repository import PACKAGES, environment
from tests.packaging.conftest import run, succeed

pytestmark = pytest.mark.timeout(600)

WHERE = "import importlib, json, sys; print(json.dumps({n: importlib.import_module(n).__file__ for n in sys.argv[1:]}))"
COMMANDS = {
    "dynamo-connectors": "connectors_cli.py",
    "dynamo-proxy": "proxy_cli.py",
    "dynamo-planner": "planner_cli.py",
}


def files_of(python: Path, *modules: str) -> dict[str, str]:
    """Module name -> the file that `python` imports it from."""
    result: dict[str, str] = json.loads(succeed(python, "-c", WHERE, *modules).splitlines()[-1])
    return result


def prefix_of(python: Path) -> str:
    return str(python.parent.parent) + "/"


def test_clean_environment_imports_everything_without_torch(clean_python: Path) -> None:
    found = files_of(clean_python, *PACKAGES)
    assert all(file.startswith(prefix_of(clean_python)) for file in found.values()), found
    assert run(clean_python, "-c", "import torch").returncode == 1
    assert "No broken requirements" in succeed(clean_python, "-m", "pip", "check")


@pytest.mark.parametrize("command", COMMANDS)
def test_clean_environment_has_the_commands(clean_python: Path, command: str) -> None:
    module = PACKAGES["dynamo_entrypoints"] / COMMANDS[command]
    assert module.exists(), f"pyproject.toml promises {command}, but {module.name} does not exist"
    assert "Usage" in succeed(clean_python.parent / command, "--help")


def test_clean_environment_survives_the_doctor(clean_python: Path) -> None:
    result = run(clean_python.parent / "dynamo-connectors", "doctor", "--json")
    report = json.loads(result.stdout)
    assert result.returncode == (0 if report["healthy"] else 1)
    levels = {finding["name"]: finding["level"] for finding in report["findings"]}
    assert levels["engines"] == "absent"
    assert levels["NIXL"] == "absent"


def problems(python: Path) -> set[str]:
    return set(run(python, "-m", "pip", "check").stdout.splitlines())


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_pip_check_reports_nothing_new(engine: str, request: pytest.FixtureRequest) -> None:
    before = problems(environment(engine) / "bin" / "python")
    after = problems(request.getfixturevalue(f"beside_{engine}"))
    assert after - before - {"No broken requirements found."} == set()


def test_beside_vllm_ours_comes_from_the_wheel(beside_vllm: Path) -> None:
    found = files_of(beside_vllm, *PACKAGES)
    assert all(file.startswith(prefix_of(beside_vllm)) for file in found.values()), found


@pytest.mark.engine
def test_vllm_offers_the_connector(beside_vllm: Path) -> None:
    text = succeed(beside_vllm, "-m", "vllm.entrypoints.cli.main", "serve", "--help=all")
    assert "--kv-connector" in text
    assert "--kvbm-" in text


@pytest.mark.parametrize(("engine", "modules"), [("vllm", ["transformers"]), ("sglang", ["transformers", "kernels"])])
def test_other_peoples_packages_stay_theirs(engine: str, modules: list[str], request: pytest.FixtureRequest) -> None:
    original = environment(engine) / "bin" / "python"
    assert files_of(request.getfixturevalue(f"beside_{engine}"), *modules) == files_of(original, *modules)
