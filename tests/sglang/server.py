"""A real SGLang server as a child process, on the CPU, with the stand-ins on its path."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests

REPOSITORY = Path(__file__).resolve().parents[2]
STAND_INS = Path(__file__).resolve().parent / "stand_ins"
_BOOT_SECONDS = 280
_STOP_SECONDS = 60


def environment_of_sglang() -> Path:
    """The interpreter of the SGLang environment that `tools/bootstrap.py sglang` builds."""
    python = Path(os.environ.get("DYNAMO_ENVS", REPOSITORY / ".envs")) / "sglang" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{python} is missing; build it with: python3 tools/bootstrap.py sglang")
    return python


def server_environment(**changes: str) -> dict[str, str]:
    ours = [REPOSITORY, *(REPOSITORY / part for part in ("kernels", "routing_proxy", "planner_sidecar", "entrypoints"))]
    python_bin = environment_of_sglang().parent
    return {
        **os.environ,
        "PATH": f"{python_bin}:{os.environ['PATH']}",
        "PYTHONPATH": ":".join(str(path) for path in [*ours, STAND_INS]),
        "PYTHONWARNINGS": "ignore",
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        **changes,
    }


def launch_command(python: Path, model: Path, *arguments: str) -> list[str]:
    command = [str(python), "-m", "sglang.launch_server", "--model-path", str(model), "--device", "cpu"]
    command += ["--attention-backend", "torch_native", "--host", "127.0.0.1", "--mem-fraction-static", "0.05"]
    return [*command, "--page-size", "16", "--sleep-on-idle", "--skip-server-warmup", *arguments]


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    url: str
    log: Path
    nvme: Path
    shm_before: frozenset[str]

    def generate(self, tokens: list[int], new_tokens: int = 6) -> dict[str, Any]:
        sampling = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": tokens, "sampling_params": sampling}
        answer = self.post("/generate", body)
        details = answer["meta_info"].get("cached_tokens_details") or {}
        return {"output": answer["output_ids"], "storage": details.get("storage", 0), "meta": answer["meta_info"]}

    def post(self, path: str, body: object = None) -> Any:
        response = requests.post(self.url + path, data=orjson.dumps(body or {}), timeout=120)
        assert response.ok, f"{path} answered {response.status_code}: {response.text[:500]}"
        return orjson.loads(response.content) if response.text.startswith(("{", "[")) else response.text

    def metric(self, name: str, *labels: str) -> float:
        """The sum of a metric's samples whose labels contain all of `labels`; 0 if there is none."""
        text = requests.get(self.url + "/metrics", timeout=30).text
        found = [line for line in text.splitlines() if line.startswith(name) and all(label in line for label in labels)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def slab(self) -> Path:
        (slab,) = self.nvme.glob("*.slab")
        return slab

    def children(self) -> list[int]:
        return list(_descendants(self.process.pid))

    def stop(self) -> None:
        """SIGTERM, as an operator would; SIGKILL only when that does not end it."""
        pids = [self.process.pid, *self.children()]
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid in pids:
            _kill_if_alive(pid)
        # SGLang leaves its own load snapshot behind; it is not ours to judge, but it is ours to clean up.
        for name in _shm_names() - self.shm_before:
            if name.startswith("sglang_loads_"):
                (Path("/dev/shm") / name).unlink(missing_ok=True)


def start_server(python: Path, model: Path, folder: Path, *arguments: str) -> Server:
    port = _free_port()
    log, nvme = folder / "server.log", folder / "kv"
    levels = ["--max-total-tokens", "512", "--enable-hierarchical-cache", "--hicache-ratio", "2"]
    tier = ["--hicache-storage-backend", "dynamo", "--kvbm-nvme-path", str(nvme), "--kvbm-nvme-gb", "0.05"]
    watch = ["--enable-metrics", "--enable-cache-report", "--port", str(port)]
    command = launch_command(python, model, *levels, *tier, *watch, *arguments)
    before = _shm_names()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=server_environment()
        )
    server = Server(process, f"http://127.0.0.1:{port}", log, nvme, before)
    try:
        _wait_until_up(server)
    except BaseException:
        server.stop()
        raise
    return server


def _wait_until_up(server: Server) -> None:
    deadline = time.monotonic() + _BOOT_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            if requests.get(server.url + "/health", timeout=20).ok:
                return
        except requests.RequestException:
            time.sleep(0.5)
    tail = "\n".join(server.log.read_text(errors="replace").splitlines()[-25:])
    pytest.fail(f"SGLang did not come up:\n{tail}", pytrace=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _shm_names() -> frozenset[str]:
    return frozenset(entry.name for entry in Path("/dev/shm").iterdir())


def _descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            yield child
            yield from _descendants(child)


def _kill_if_alive(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
