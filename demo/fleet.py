"""The processes of the demo: two vLLM replicas, the proxy before them, the planner beside them."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tools.server_process import ServerError, ServerProcess, free_port
from tools.vllm_server import VllmOptions, vllm_server

HBM_BLOCKS = 320
DRAM_GB = "0.06"
BIN = Path(sys.executable).parent


@dataclass
class Fleet:
    """Everything that was started. `close` stops it in the opposite order."""

    model: Path
    logs: Path
    replicas: list[ServerProcess] = field(default_factory=list)
    stack: ExitStack = field(default_factory=ExitStack)
    proxy_url: str = ""
    admin_url: str = ""

    def launch(self, server: ServerProcess, stop_seconds: float = 30.0) -> ServerProcess:
        # Registered first: Ctrl-C in the middle of a start must find it.
        self.stack.callback(server.stop, stop_seconds)
        return server.start()

    def start_replicas(self, count: int) -> None:
        for number in range(count):
            options = VllmOptions(
                hbm_blocks=HBM_BLOCKS,
                events_port=free_port(),
                extra=["--kv-connector", "dynamo", "--kvbm-host-dram-gb", DRAM_GB],
            )
            replica = vllm_server(f"replica {number}", self.model, self.logs / f"replica-{number}.log", options)
            self.replicas.append(self.launch(replica))
            self.stack.callback(self._ask_replicas_to_stop)

    def wait_replicas(self, tick: Callable[[float], None]) -> None:
        for replica in self.replicas:
            replica.wait_ready(tick=tick)

    def start_proxy(self) -> None:
        port, admin_port = free_port(), free_port()
        command = [str(BIN / "dynamo-proxy"), "--port", str(port), "--admin-port", str(admin_port)]
        for replica in self.replicas:
            command += ["--engine", replica.url]
        self.proxy_url, self.admin_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}"
        self.launch(ServerProcess("dynamo-proxy", command, self.proxy_url, self.logs / "proxy.log")).wait_ready(60)

    def start_planner(self, name: str, *flags: str) -> str:
        """Starts a planner that watches the proxy's engines; returns its URL. Decisions go to `NAME.jsonl`."""
        port = free_port()
        command = [str(BIN / "dynamo-planner"), "--proxy-admin", self.admin_url, "--port", str(port)]
        command += ["--decision-log", str(self.decision_log(name)), "--interval-seconds", "2", *flags]
        url = f"http://127.0.0.1:{port}"
        server = ServerProcess("dynamo-planner", command, url, self.logs / f"{name}.log")
        # It first drains and stops the replicas it has started itself.
        self.launch(server, stop_seconds=120).wait_ready(60)
        return url

    def decision_log(self, name: str) -> Path:
        return self.logs / f"{name}.jsonl"

    def engines(self) -> list[dict[str, Any]]:
        answer = json.loads(self._get(self.admin_url + "/engines"))
        engines: list[dict[str, Any]] = answer["engines"]
        return engines

    def set_router_mode(self, mode: str) -> None:
        post(self.admin_url + "/router-mode", {"mode": mode})

    def metric(self, name: str) -> float:
        """Sum of a metric over the replicas."""
        return sum(
            sample.value
            for replica in self.replicas
            for family in text_string_to_metric_families(self._get(replica.url + "/metrics"))
            for sample in family.samples
            if sample.name == name
        )

    def close(self) -> None:
        self.stack.close()

    def _ask_replicas_to_stop(self) -> None:
        for replica in self.replicas:
            replica.ask_to_stop()

    def _get(self, url: str) -> str:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return str(answer.read().decode())
        except OSError as error:
            raise ServerError(f"{url} does not answer: {error}") from error


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
    except OSError as error:
        raise ServerError(f"{url} refused {body}: {error}") from error
    return json.loads(text) if text else None
