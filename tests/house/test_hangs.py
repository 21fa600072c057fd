"""A test that hangs must end its run with an error, also where the hang sits inside uvloop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.repository import ROOT

HANGS = {
    "in the loop": "uvloop.run(asyncio.sleep(1000))",
    "in a clean-up": "uvloop.run(stubborn())",
}


@pytest.mark.parametrize("where", HANGS)
def test_a_hang_ends_the_run_loudly(where: str, tmp_path: Path) -> None:
    code = (
        "import asyncio, uvloop\n"
        "async def stubborn():\n"
        "    try:\n        await asyncio.sleep(1000)\n"
        "    finally:\n        await asyncio.Event().wait()\n"
        f"def test_it():\n    {HANGS[where]}\n"
    )
    (tmp_path / "test_hanging.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--timeout=1"]
    command += ["-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode not in (0, 5)
    assert "Timeout" in done.stdout + done.stderr
    assert HANGS[where].split("(")[0] in done.stdout + done.stderr
