"""How benches and tests launch a real SGLang on the CPU, with stand-ins for what only its GPU build has."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.server_process import ServerProcess, free_port

STAND_INS = Path(__file__).resolve().parent / "sglang_stand_ins"
PAGE_TOKENS = 16


def default_environment() -> Path:
    """SGLang's environment beside the running one."""
    return Path(sys.prefix).parent / "sglang"


def server_variables(environment: Path, import_path: str = "", **changes: str) -> dict[str, str]:
    """`import_path` comes before what is installed in `environment`."""
    path = [*filter(None, [import_path]), str(STAND_INS)]
    return {
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONWARNINGS": "ignore",
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        **changes,
    }


def launch_command(environment: Path, model: Path, *arguments: str) -> list[str]:
    command = [str(environment / "bin" / "python"), "-m", "sglang.launch_server"]
    command += ["--model-path", str(model), "--device", "cpu", "--attention-backend", "torch_native"]
    command += ["--host", "127.0.0.1", "--mem-fraction-static", "0.05", "--page-size", str(PAGE_TOKENS)]
    return [*command, "--sleep-on-idle", "--skip-server-warmup", *arguments]


def sglang_server(name: str, model: Path, log: Path, extra: Sequence[str]) -> ServerProcess:
    """A server that is not started yet."""
    port, environment = free_port(), default_environment()
    command = launch_command(environment, model, "--port", str(port), *extra)
    variables = server_variables(environment, os.environ.get("PYTHONPATH", ""))
    return ServerProcess(name, command, f"http://127.0.0.1:{port}", log, variables)
