"""A real SGLang server as a child process, on the CPU, with the stand-ins on its path."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from tests.house.repository import environment, import_path
from tools import sglang_server
from tools.server_process import ServerProcess, free_port
from tools.sglang_server import server_variables

VOCABULARY = 512
ADMIN_KEY = "key-of-the-tests"


def server_environment(name: str = "sglang", **changes: str) -> dict[str, str]:
    return server_variables(environment(name), import_path(), **changes)


def launch_command(model: Path, *arguments: str, name: str = "sglang") -> list[str]:
    return sglang_server.launch_command(environment(name), model, *arguments)


@dataclass(frozen=True)
class Answer:
    output: list[int]
    #: Prompt tokens that came from the storage backend.
    storage_tokens: int
    #: Prompt tokens that came from SGLang's own second level.
    host_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Server:
    process: ServerProcess
    nvme: Path
    model: Path
    replay_port: int

    def generate(self, tokens: list[int], **fields: object) -> Answer:
        sampling = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
        answer = self.post("/generate", {"input_ids": tokens, "sampling_params": sampling, **fields})
        meta = answer["meta_info"]
        details = meta.get("cached_tokens_details") or {}
        return Answer(answer["output_ids"], details.get("storage", 0), details.get("host", 0), meta["cached_tokens"])

    def post(self, path: str, body: object = None) -> Any:
        return self.call("POST", path, body)

    def log(self) -> str:
        return self.process.log.read_text()

    def call(self, method: str, path: str, body: object = None, expect: int = 200) -> Any:
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        response = requests.request(method, self.process.url + path, json=body or {}, headers=headers, timeout=120)
        assert response.status_code == expect, f"{path} answered {response.status_code}: {response.text[:500]}"
        return response.json() if response.text.startswith(("{", "[")) else response.text

    def metric(self, name: str, *labels: str) -> float:
        """The sum of a metric's samples whose labels contain all of `labels`; 0 if there is none."""
        text = requests.get(self.process.url + "/metrics", timeout=60).text
        found = [line for line in text.splitlines() if line.startswith(name) and all(label in line for label in labels)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def slab(self) -> Path:
        (slab,) = self.nvme.glob("*.slab")
        return slab


def prompts(seed: int, count: int, tokens: int = 320) -> list[list[int]]:
    """Longer than the 256 tokens below which SGLang never asks a storage backend."""
    choose = random.Random(seed)
    return [[choose.randrange(7, VOCABULARY) for _ in range(tokens)] for _ in range(count)]


def make_server(model: Path, folder: Path, *more: str, name: str = "sglang") -> Server:
    """Not started. Its first two levels hold 512 and 1024 tokens: a handful of prompts flushes them."""
    port, events_port, replay_port = free_port(), free_port(), free_port()
    nvme = folder / "kv"
    nvme.mkdir(exist_ok=True)
    levels = ["--max-total-tokens", "512", "--enable-hierarchical-cache", "--hicache-ratio", "2"]
    tier = ["--hicache-storage-backend", "dynamo", "--kvbm-nvme-path", str(nvme), "--kvbm-nvme-gb", "0.05"]
    patience = ["--hicache-storage-prefetch-policy", "wait_complete"]
    watch = ["--enable-metrics", "--enable-cache-report", "--port", str(port)]
    watch += ["--admin-api-key", ADMIN_KEY, "--kv-events-config"]
    endpoints = {"endpoint": f"tcp://*:{events_port}", "replay_endpoint": f"tcp://*:{replay_port}"}
    watch.append(json.dumps({"publisher": "zmq", "topic": "kv-events", **endpoints}))
    command = launch_command(model, *levels, *tier, *patience, *watch, *more, name=name)
    url = f"http://127.0.0.1:{port}"
    process = ServerProcess("sglang", command, url, folder / "server.log", server_environment(name))
    return Server(process, nvme, model, replay_port)
