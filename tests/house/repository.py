"""Where things lie in this repository: its packages, its Python files, its environments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Import name -> folder, as in the table of CONTRIBUTING.md.
PACKAGES = {
    "dynamo_connectors": ROOT / "dynamo_connectors",
    "dynamo_kernels": ROOT / "kernels" / "dynamo_kernels",
    "dynamo_proxy": ROOT / "routing_proxy" / "dynamo_proxy",
    "dynamo_planner": ROOT / "planner_sidecar" / "dynamo_planner",
    "dynamo_entrypoints": ROOT / "entrypoints" / "dynamo_entrypoints",
}


def tracked_files() -> list[Path]:
    """Every file that git tracks or would track, as absolute paths."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    names = sorted(set(filter(None, listing.split("\0"))))
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def environment(name: str) -> Path:
    """The folder of a locked environment: a worktree without its own reads `DYNAMO_ENVS`, or uses the running one's."""
    candidates = [ROOT / ".envs" / name, Path(sys.prefix).parent / name]
    if "DYNAMO_ENVS" in os.environ:
        candidates.insert(1, Path(os.environ["DYNAMO_ENVS"]) / name)
    for folder in candidates:
        if (folder / "bin" / "python").exists():
            return folder
    raise FileNotFoundError(f"no environment {name!r}: run `python3 tools/bootstrap.py {name}` or set DYNAMO_ENVS")


def import_path() -> str:
    """PYTHONPATH under which this checkout's packages win over an editable install of another checkout."""
    folders = [ROOT, *(folder.parent for folder in PACKAGES.values())]
    return os.pathsep.join(dict.fromkeys(str(folder) for folder in folders))
