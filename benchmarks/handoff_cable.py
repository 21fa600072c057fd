"""Faults in the middle of a transfer between two hosts: ours, and vLLM's own NixlConnector.

Options: one column alone (`dynamo` or `stock`), and words (`"decode killed"`); only the rows that say one of them.

A real prefill and a real decode vLLM on two hosts (network namespaces) with a cable between them, made slow so that a
fault hits a transfer of which a third is over. The client reaches both by other ways.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Timer

from benchmarks.handoff_columns import Column, Held, OurPair, StockPair, awake, run_columns
from tests.house.repository import ROOT
from tests.transport.network import Cable
from tools.server_process import ServerProcess
from tools.vllm_server import MODEL_NAME

#: A transfer takes some 4 s, and some 30.
SLOW, VERY_SLOW = "8mbit", "1mbit"
STOPS_SECONDS = 15.0
CUTS_SECONDS = (1.0, 10.0, 60.0)
PATIENCE_SECONDS = 120.0
#: More than HBM holds, so that they get the blocks of whoever is gone.
OTHERS = 7
#: How the client reaches the decode engine.
ASIDE = ("10.78.0.1", "10.78.0.2")
FAR = "DYNAMO_BENCH_FAR_PROCESS"
_ENV = {"UCX_NET_DEVICES": "cable", "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
_SENT = Path("/sys/class/net/cable/statistics/tx_bytes")


class OurFarPair(OurPair):
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


class StockFarPair(StockPair):
    def flags(self, role: str) -> list[str]:
        return [*super().flags(role), "--host", "0.0.0.0"]

    def env(self, role: str) -> dict[str, str]:
        return {**super().env(role), **_ENV, "VLLM_NIXL_SIDE_CHANNEL_HOST": Cable.hosts[role == "decode"]}

    def _server(self, role: str, port: int) -> ServerProcess:
        return _moved(super()._server(role, port), role, port)


def _moved(server: ServerProcess, role: str, port: int) -> ServerProcess:
    if role == "decode":
        server.command = ["nsenter", "-n", "-m", "-t", os.environ[FAR], *server.command]
        server.url = f"http://{ASIDE[1]}:{port}"
    return server


def plug(state: str) -> None:
    subprocess.run(["ip", "link", "set", "cable", state], check=True)


def slow_down(rate: str) -> None:
    shape = ["tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]
    subprocess.run(["tc", "qdisc", "replace", "dev", "cable", "root", *shape], check=True)


def sent_bytes() -> int:
    return int(_SENT.read_text())


class OnACable(Column):
    def rows(self) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "no fault, 5 prompts", partial(self.handed_over, 5)
        slow_down(SLOW)
        yield "a slow cable", lambda: self.judge(self.hold())
        before = sent_bytes()
        self.handed_over(1)
        self._third = (sent_bytes() - before) // 3
        for side, server in self._servers().items():
            yield f"{side} stopped for {STOPS_SECONDS:.0f} s during a transfer", partial(self._stopped, server)
        yield f"client leaves during a transfer, {OTHERS} others", self._left_by_client
        yield f"a transfer of 30 s, {OTHERS} others", self._late
        for side, server in self._servers().items():
            yield f"{side} killed during a transfer", partial(self._killed, server)
        for seconds in CUTS_SECONDS:
            yield f"cable cut for {seconds:.0f} s during a transfer", partial(self._cut, seconds)

    def _servers(self) -> dict[str, ServerProcess]:
        return {"prefill": self.pair.prefill_server, "decode": self.pair.decode_server}

    def _during(self, fault: Callable[[], object]) -> str:
        self._until_handed_over()
        start = sent_bytes()
        return self.judge_with_fault(fault, partial(self._third_is_over, start), self.hold())

    def _third_is_over(self, start: int) -> bool:
        """False when nothing comes."""
        deadline = time.monotonic() + 30.0
        while sent_bytes() < start + self._third:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def _stopped(self, server: ServerProcess) -> str:
        goes_on = Timer(STOPS_SECONDS, server.go_on)

        def stop() -> None:
            server.stand_still()
            goes_on.start()

        said = self._during(stop)
        goes_on.join()
        return f"{said}; {self._next()}"

    def _killed(self, server: ServerProcess) -> str:
        return f"{self._during(server.kill)}; {self._next()}"

    def _cut(self, seconds: float) -> str:
        joined = Timer(seconds, plug, ["up"])

        def cut() -> None:
            plug("down")
            joined.start()

        said = f"{self._during(cut)}; {self._next()}"
        joined.join()
        return f"{said}; {self._until_handed_over()}"

    def _until_handed_over(self) -> str:
        started = time.monotonic()
        while True:
            before = sent_bytes()
            said = self._next()
            seconds = time.monotonic() - started
            if sent_bytes() - before > self._third or seconds > PATIENCE_SECONDS:
                return f"{said}; {seconds:.1f} s after the cable was back"

    def _left_by_client(self) -> str:
        self._until_handed_over()
        held, start = self.hold(), sent_bytes()
        connection = http.client.HTTPConnection(self.pair.decode.url.removeprefix("http://"), timeout=60)
        body = {"model": MODEL_NAME, "prompt": held.tokens, "stream": True, "kv_transfer_params": held.ticket}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        seen = self._third_is_over(start)
        connection.close()
        return f"{'' if seen else 'no transfer was seen; '}{self._others()}; {self._next()}"

    def _late(self) -> str:
        """Ours gives a transfer up after 10 s; its bytes still come."""
        slow_down(VERY_SLOW)
        said = self.judge(self.hold())
        others = self._others()
        slow_down(SLOW)
        return f"{said}; {others}; {self._next()}"

    def _others(self) -> str:
        right = 0
        for _ in range(OTHERS):
            tokens = self.prompt()
            alone = self.pair.prefill.complete(tokens).tokens
            right += self.judge(Held(tokens, alone, {})).startswith("right")
        return f"{right} others right"

    def _next(self) -> str:
        """The next request, when whoever has died was started again."""
        died = [side for side, server in self._servers().items() if not server.is_healthy()]
        for side in died:
            self._servers()[side].kill()
            awake(self._servers()[side].start())
        again = f"{' and '.join(died)} started again, " if died else ""
        return f"{again}the next one {self.judge(self.hold())}"


def main(arguments: list[str]) -> int:
    if FAR in os.environ:  # on the host of the prefill engine
        columns = {"dynamo": partial(OurFarPair, transports="tcp"), "stock": partial(StockFarPair, transports="tcp")}
        return run_columns(columns, OnACable, *arguments)
    cable = Cable()
    try:
        cable.lay("aside", ASIDE)
        command = ["env", "-C", str(ROOT), sys.executable, "-m", "benchmarks", "handoff_cable", *arguments]
        env = {**os.environ, FAR: str(cable.far)}
        return subprocess.run([*cable.inside(0), *command], env=env, check=False).returncode
    finally:
        cable.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
