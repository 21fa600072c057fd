"""What no file of the repository may say, and what README.md says being true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.house.repository import PACKAGES, ROOT, tracked_files

# Written in pieces: this file is searched too.
REGISTRY_HOSTS = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
        ("deb", "debian", "org"),
        ("proxy", "golang", "org"),
        ("crates", "io"),
        ("download", "pytorch", "org"),
    )
]
MACHINE_PATH = re.compile(r"(?<![\w.\-/$}~])/(?:work|root|home/\w+|tmp/(?:wt|bash_jobs[.\d]*))/")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
OUR_COMMAND = re.compile(r"\bdynamo-(?:proxy|planner|connectors)\b|--kv-connector|--kvbm-")
# Options of the engines' own that stand on our launch lines.
ENGINE_FLAGS = {
    "--model-path",
    "--enable-hierarchical-cache",
    "--hicache-storage-backend",
    "--port",
    "--host",
    "--help",
}


def texts() -> list[tuple[Path, str]]:
    found = []
    for path in tracked_files():
        try:
            found.append((path, path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:  # a picture
            continue
    return found


def test_no_file_names_a_registry_host() -> None:
    found = [f"{path.relative_to(ROOT)}: {host}" for path, text in texts() for host in REGISTRY_HOSTS if host in text]
    assert not found, "\n".join(found)


def test_no_file_names_a_path_of_one_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}" for path, text in texts() for match in MACHINE_PATH.finditer(text)
    ]
    assert not found, "\n".join(found)


def test_machine_paths_are_recognised() -> None:
    for text in ("see /" + "work/main", "'/" + "tmp/wt/x/y'", "=/" + "home/me/x"):
        assert MACHINE_PATH.search(text), text
    for text in ("the demo/work/ folder", "$ROOT/work/x", "./work/x", "/workers/", "home/work"):
        assert not MACHINE_PATH.search(text), text


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"])
def test_the_texts_exist(name: str) -> None:
    assert (ROOT / name).read_text().strip()


def launch_flags(readme: str) -> set[str]:
    """Flags on the lines of code blocks that start something of ours."""
    flags: set[str] = set()
    for block in re.findall(r"```.*?\n(.*?)```", readme, re.DOTALL) + re.findall(
        r"(?:^ {4}.*\n)+", readme, re.MULTILINE
    ):
        for line in block.replace("\\\n", " ").splitlines():
            if OUR_COMMAND.search(line):
                flags.update(FLAG.findall(line))
    return flags


def test_flags_in_the_readme_exist() -> None:
    code = "\n".join(path.read_text() for folder in PACKAGES.values() for path in folder.rglob("*.py"))
    unknown = [
        flag
        for flag in sorted(launch_flags((ROOT / "README.md").read_text()) - ENGINE_FLAGS)
        if flag not in code and not re.search(rf"\b{flag[2:].replace('-', '_')}\b", code)
    ]
    assert not unknown, f"README.md shows {unknown}, which no code of ours knows"


def test_launch_flags_are_found() -> None:
    text = (
        "```bash\nvllm serve M --kv-connector dynamo \\\n  --kvbm-x 3\nls --all\n```\n\n    dynamo-proxy --engine a\n"
    )
    assert launch_flags(text) == {"--kv-connector", "--kvbm-x", "--engine"}
