"""A prefill and a decode engine, and a proxy of five lines between them: the engine's own protocol, nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.vllm.client import Answer, VllmClient
from tools.server_process import ServerProcess, free_port
from tools.vllm_server import MODEL_NAME, VllmOptions, vllm_server

#: What vLLM's documentation tells a proxy to ask of the prefill engine.
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


class Pair:
    """Both engines boot at the same time. `kill` and `start_prefill` take the prefill engine away and bring it back."""

    def __init__(self, model: Path, logs: Path, decode: Sequence[str] = (), transports: str = "") -> None:
        self._model, self._logs, self._transports = model, logs, transports
        self.peer_port, self._prefill_port = free_port(), free_port()
        self.stack = ExitStack()
        self.decode_server = self._server("decode", ["--kvbm-role", "decode", *decode], None)
        self.prefill_server = self._prefill()

    def start(self) -> Pair:
        for server in (self.decode_server, self.prefill_server):
            server.start()
        for server in (self.decode_server, self.prefill_server):
            server.wait_ready()
        self.decode = VllmClient(self.decode_server.url)
        self.prefill = VllmClient(self.prefill_server.url)
        return self

    def close(self) -> None:
        for server in (self.decode_server, self.prefill_server):
            server.ask_to_stop()
        for server in (self.decode_server, self.prefill_server):
            server.stop()

    def start_prefill(self) -> None:
        """At the same address as before."""
        self.prefill_server.stop()
        self.prefill_server = self._prefill()
        self.prefill_server.start().wait_ready()

    def ticket(self, tokens: list[int]) -> dict[str, Any]:
        """The prefill leg: computes the prompt, and says where its KV is."""
        body = {"model": MODEL_NAME, "prompt": tokens, "max_tokens": 1, "kv_transfer_params": PREFILL}
        params: dict[str, Any] = self.prefill.post("/v1/completions", body)["kv_transfer_params"]
        return params

    def complete(self, tokens: list[int], max_tokens: int = 8) -> Answer:
        """Both legs, as any proxy does it."""
        return self.decode.complete(tokens, max_tokens, kv_transfer_params=self.ticket(tokens))

    def from_peer(self) -> float:
        """Blocks that requests have got from the prefill engine."""
        return self.decode.metric("dynamo_kvbm_hit_blocks_total", tier="peer")

    def _prefill(self) -> ServerProcess:
        roles = ["--kvbm-role", "prefill", "--kvbm-peer-port", str(self.peer_port)]
        return self._server("prefill", roles, self._prefill_port)

    def _server(self, name: str, roles: Sequence[str], port: int | None) -> ServerProcess:
        sizes = ["--kv-connector", "dynamo", "--kvbm-host-dram-gb", "0.02", "--kvbm-load-gate", "off"]
        options = VllmOptions(extra=[*sizes, *roles])
        server = vllm_server(name, self._model, self._logs / f"{name}.log", options, port)
        env = {**server.env, "UCX_LOG_LEVEL": "error"}
        if self._transports:
            env["UCX_TLS"] = self._transports
        server.env = env
        return server
