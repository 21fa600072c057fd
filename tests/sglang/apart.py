"""A prefill and a decode SGLang on this host, and who asks both at once, as SGLang's router does."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from tests.sglang.server import launch_command, server_environment
from tools.server_process import ServerProcess, free_port

BOOT_SECONDS = 600.0
_BACKEND = ["--disaggregation-transfer-backend", "dynamo"]


def make(name: str, model: Path, folder: Path, *more: str) -> ServerProcess:
    port = free_port()
    command = launch_command(model, "--port", str(port), "--max-total-tokens", "4096", "--enable-metrics", *more)
    return ServerProcess(name, command, f"http://127.0.0.1:{port}", folder / f"{name}.log", server_environment())


def ask(server: ServerProcess, tokens: list[int], **fields: object) -> requests.Response:
    sampling = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True, **fields}
    return requests.post(f"{server.url}/generate", json=body, timeout=120)


def answer(response: requests.Response) -> tuple[list[int], list[Any]]:
    assert response.status_code == 200, response.text[:500]
    content = response.json()
    return content["output_ids"], content["meta_info"]["output_token_logprobs"]


def metric(server: ServerProcess, name: str) -> float:
    """The sum of a metric's samples; 0 if there is none."""
    lines = requests.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@dataclass(frozen=True)
class Fleet:
    prefill: ServerProcess
    decode: ServerProcess
    bootstrap_port: int

    def room(self) -> dict[str, object]:
        room = random.getrandbits(62) + 1
        return {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.bootstrap_port, "bootstrap_room": room}

    def ask(self, tokens: list[int]) -> requests.Response:
        """Both at once, as SGLang's router does; the answer is decode's."""
        room = self.room()
        first = threading.Thread(target=ask, args=(self.prefill, tokens), kwargs=room)
        first.start()
        try:
            return ask(self.decode, tokens, **room)
        finally:
            first.join()


@contextmanager
def started_fleet(model: Path, folder: Path) -> Iterator[Fleet]:
    port = free_port()
    prefill_flags = ["--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", str(port)]
    prefill = make("prefill", model, folder, *prefill_flags, *_BACKEND)
    decode = make("decode", model, folder, "--disaggregation-mode", "decode", *_BACKEND)
    try:
        prefill.start()
        decode.start().wait_ready(BOOT_SECONDS)
        prefill.wait_ready(BOOT_SECONDS)
        yield Fleet(prefill, decode, port)
    finally:
        prefill.stop()
        decode.stop()
