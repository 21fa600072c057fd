"""A prefill and a decode engine, and a proxy of five lines between them: the engine's own protocol, nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.vllm.client import VllmClient
from tools.server_process import ServerProcess, free_port
from tools.vllm_server import MODEL_NAME, VllmOptions, vllm_server

#: What vLLM's documentation tells a proxy to ask of the prefill engine.
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
#: Full blocks of one prompt of `client.prompt`.
BLOCKS = 28


class Pair:
    """The engines boot one after the other. `decode` are more flags of that engine."""

    def __init__(self, model: Path, logs: Path, decode: Sequence[str] = (), transports: str = "") -> None:
        self._model, self._logs, self._transports, self._decode_flags = model, logs, transports, decode
        self._peer_port = free_port()
        self.decode_server = self._server("decode", free_port())
        self.prefill_server = self._server("prefill", free_port())

    def start(self) -> Pair:
        for server in (self.decode_server, self.prefill_server):
            server.start().wait_ready(600.0)
        self.decode = VllmClient(self.decode_server.url)
        self.prefill = VllmClient(self.prefill_server.url)
        return self

    def close(self) -> None:
        for server in (self.decode_server, self.prefill_server):
            server.ask_to_stop()
        for server in (self.decode_server, self.prefill_server):
            server.stop()

    def ticket(self, tokens: list[int]) -> dict[str, Any]:
        """The prefill leg: computes the prompt, and says where its KV is."""
        body = {"model": MODEL_NAME, "prompt": tokens, "max_tokens": 1, "kv_transfer_params": PREFILL}
        params: dict[str, Any] = self.prefill.post("/v1/completions", body)["kv_transfer_params"]
        return params

    def from_peer(self) -> float:
        """Blocks that requests have got from the prefill engine."""
        return self.decode.metric("dynamo_kvbm_hit_blocks_total", tier="peer")

    def flags(self, role: str) -> list[str]:
        flags = ["--kv-connector", "dynamo", "--kvbm-host-dram-gb", "0.02", "--kvbm-load-gate", "off"]
        # Rows for half of a prompt: they are used again and again.
        flags += ["--kvbm-role", role, "--kvbm-peer-hbm-gb", "0.001"]
        more = self._decode_flags if role == "decode" else ["--kvbm-peer-port", str(self._peer_port)]
        return [*flags, *more]

    def env(self, role: str) -> dict[str, str]:
        return {"UCX_LOG_LEVEL": "error"} | ({"UCX_TLS": self._transports} if self._transports else {})

    def _server(self, role: str, port: int) -> ServerProcess:
        options = VllmOptions(events_port=free_port() if role == "prefill" else None, extra=self.flags(role))
        server = vllm_server(role, self._model, self._logs / f"{role}.log", options, port)
        server.env = {**server.env, **self.env(role)}
        return server
