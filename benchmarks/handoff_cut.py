"""The network between a real prefill and a real decode vLLM is cut for 1, 10 and 60 s: ours, and NixlConnector.

Option: one column alone (`dynamo` or `stock`). The engines are on two hosts (network namespaces) with a cable between
them; the client reaches both by other ways. Each answer is compared with that of the prefill engine alone, token by
token. vLLM's connector wants the package `nixl` beside its build.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.handoff_faults import StockPair, Table
from tests.house.repository import ROOT
from tests.transport.network import Cable
from tests.vllm.client import prompt
from tests.vllm.pair import Pair
from tools.server_process import ServerProcess
from tools.tiny_model import make_model

CUTS_SECONDS = (1.0, 10.0, 60.0)
PATIENCE_SECONDS = 180.0
#: How the client reaches the decode engine.
ASIDE = ("10.78.0.1", "10.78.0.2")
FAR = "DYNAMO_BENCH_FAR_PROCESS"


class FarPair(Pair):
    """The decode engine is on the other host. This process is on that of the prefill engine."""

    def flags(self, role: str) -> list[str]:
        secret = self._logs / "secret"
        secret.write_bytes(b"of the two hosts" * 2)
        secret.chmod(0o600)
        mine = [*super().flags(role), "--kvbm-peer-secret-file", str(secret), "--host", "0.0.0.0"]
        return [*mine, "--kvbm-peer-host", Cable.hosts[0]] if role == "prefill" else mine

    def env(self, role: str) -> dict[str, str]:
        return {**super().env(role), **_ENV}

    def _server(self, role: str, port: int) -> ServerProcess:
        return _moved(super()._server(role, port), role, port)


class FarStockPair(StockPair):
    def flags(self, role: str) -> list[str]:
        return [*super().flags(role), "--host", "0.0.0.0"]

    def env(self, role: str) -> dict[str, str]:
        return {**super().env(role), **_ENV, "VLLM_NIXL_SIDE_CHANNEL_HOST": Cable.hosts[role == "decode"]}

    def _server(self, role: str, port: int) -> ServerProcess:
        return _moved(super()._server(role, port), role, port)


_ENV = {"UCX_NET_DEVICES": "cable", "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
COLUMNS: dict[str, type[Pair]] = {"dynamo": FarPair, "stock": FarStockPair}


def _moved(server: ServerProcess, role: str, port: int) -> ServerProcess:
    if role == "decode":
        server.command = ["nsenter", "-n", "-m", "-t", os.environ[FAR], *server.command]
        server.url = f"http://{ASIDE[1]}:{port}"
    return server


def plug(state: str) -> None:
    subprocess.run(["ip", "link", "set", "cable", state], check=True)


class Cuts(Table):
    def rows(self) -> Iterator[tuple[str, str]]:
        yield "no fault, 3 prompts", self.no_fault(3)
        for seconds in CUTS_SECONDS:
            held = [(tokens, self._pair.prefill.complete(tokens).tokens, self._pair.ticket(tokens)) for tokens in
                    (self.prompt(), self.prompt())]  # fmt: skip
            plug("down")
            joined = threading.Timer(seconds, plug, ["up"])
            joined.start()
            for which, (tokens, alone, ticket) in zip(("first", "next"), held, strict=True):
                yield f"cut for {seconds:.0f} s, the {which} request", self.judge(tokens, ticket, alone)
            joined.join()
            yield f"after {seconds:.0f} s, until a prompt is handed over", self._until_handed_over()

    def _until_handed_over(self) -> str:
        started = time.monotonic()
        said = ""
        while time.monotonic() - started < PATIENCE_SECONDS:
            tokens = self.prompt()
            alone, ticket = self._pair.prefill.complete(tokens).tokens, self._pair.ticket(tokens)
            before = self._bytes()
            said = self.judge(tokens, ticket, alone)
            if self._bytes() > before or not said.startswith("right"):
                break
        return f"{said}; {time.monotonic() - started:.1f} s after the cable was back"

    def _bytes(self) -> float:
        self._pair.decode.complete(prompt(1 << 20, 1), 1)  # what arrived is told by steps
        names = ("dynamo_nixl_read_bytes_total", "vllm:nixl_bytes_transferred_sum")
        return sum(self._pair.decode.metric(name) for name in names)


def inside(only: str) -> int:
    """On the host of the prefill engine."""
    wrong = False
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model")
        for name, kind in COLUMNS.items():
            if only not in ("", name):
                continue
            logs = Path(folder) / name
            logs.mkdir()
            pair = kind(model, logs, transports="tcp")
            try:
                pair.start()
                pair.decode.complete(
                    prompt(0)
                )  # a CPU worker of vLLM may die of SIGILL at a first forward of one token
                for what, said in Cuts(pair, 1).rows():
                    wrong |= name == "dynamo" and "right" not in said
                    print(f"{name}: {what}: {said}", flush=True)
            finally:
                pair.close()
    return 1 if wrong else 0


def main(arguments: list[str]) -> int:
    only = arguments[0] if arguments else ""
    if FAR in os.environ:
        return inside(only)
    cable = Cable()
    try:
        cable.lay("aside", ASIDE)
        command = [
            *cable.inside(0),
            "env",
            "-C",
            str(ROOT),
            sys.executable,
            "-m",
            "benchmarks",
            "handoff_cut",
            *arguments,
        ]
        return subprocess.run(command, env={**os.environ, FAR: str(cable.far)}, check=False).returncode
    finally:
        cable.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
