"""Compiles the proxy's hot modules into a wheel, when DYNAMO_COMPILE=1 asks for it; the wheel is pure Python otherwise.

    DYNAMO_COMPILE=1 pip install .     # needs a C compiler; the same package, about twice the requests per core

The sources go into the wheel as they are, and beside them what mypyc makes of these modules, which Python prefers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path(__file__).resolve().parent
PACKAGE = "dynamo_proxy"
# What a request or a chunk passes through. Not `metrics`: a base of its class is not ours, and mypyc must know it. Not
# `receipts`: orjson looks for the fields of a dataclass where a compiled one has none, and crashes.
MODULES = (
    "account", "approx_index", "block_hash", "breaker", "client_connection", "compact_map", "engines", "errors",
    "exchange", "flow_control", "front_end", "guard", "handoff", "hints", "http1", "http_heads", "intake", "knowledge",
    "kv_index", "last_resort", "learning", "ledger", "limits", "outgoing", "policy", "prefill_leg", "prefix_walk",
    "router", "sessions", "sglang_tapes", "speeds", "stream_tape", "tallies", "text_chain", "token_memo", "upstream",
    "waiting_room", "wire",
)  # fmt: skip
# Exact: another compiler is another program.
REQUIREMENTS = ["mypy[mypyc]==2.4.1", "setuptools==80.9.0"]


class CompileError(RuntimeError):
    """The modules could not be compiled; the text says what to do."""


class CompileHook(BuildHookInterface[Any]):
    """Adds the compiled modules to a wheel."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        return REQUIREMENTS if _is_wanted() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if not _is_wanted() or version == "editable":
            return
        self._built = tempfile.TemporaryDirectory()
        target = Path(self._built.name)
        if subprocess.run([sys.executable, __file__, str(target)], cwd=FOLDER, check=False).returncode:
            raise CompileError(
                "DYNAMO_COMPILE=1, but the proxy could not be compiled (why: above); that needs a C compiler and the "
                "headers of Python (apt-get install gcc python3-dev); without DYNAMO_COMPILE the wheel is pure Python"
            )
        for path in target.rglob("*.so"):
            build_data["force_include"][str(path)] = str(path.relative_to(target))
        build_data.update(pure_python=False, infer_tag=True)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if not build_data["pure_python"]:
            self._built.cleanup()


def _is_wanted() -> bool:
    return os.environ.get("DYNAMO_COMPILE", "0") not in ("", "0")


def compile_into(target: str) -> None:
    """Run in FOLDER, with REQUIREMENTS installed. Whatever else is installed makes no difference."""
    from mypyc.build import mypycify
    from setuptools import setup

    with tempfile.TemporaryDirectory() as scratch:
        flags = ["--config-file=", "--no-site-packages", "--ignore-missing-imports", f"--cache-dir={scratch}/mypy"]
        paths = [f"{PACKAGE}/{module}.py" for module in MODULES]
        modules = mypycify(
            [*flags, *paths],
            opt_level="2",
            debug_level="0",
            group_name=PACKAGE,
            target_dir=f"{scratch}/c",
        )
        command = ["build_ext", "--build-lib", target, "--build-temp", f"{scratch}/o"]
        setup(name=PACKAGE, ext_modules=modules, packages=[], script_args=command)


if __name__ == "__main__":
    compile_into(sys.argv[1])
