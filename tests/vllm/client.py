"""A small client that keeps what must be compared bit for bit: token ids and their logprobs."""

from __future__ import annotations

import json
import random
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tools.server_process import ServerProcess
from tools.vllm_server import CHUNK_TOKENS, MODEL_NAME


class Answer(NamedTuple):
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def prompt(seed: int, chunks: int = 7) -> list[int]:
    """Random tokens that end four tokens behind a multiple of the prefill chunk."""
    rng = random.Random(seed)
    return [rng.randrange(10, 500) for _ in range(chunks * CHUNK_TOKENS + 4)]


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain until {what}"
        time.sleep(0.05)


@contextmanager
def serving(server: ServerProcess) -> Iterator[VllmClient]:
    """Started, asked, stopped; what it logged meanwhile has no traceback. Two engines may start in this time."""
    try:
        server.start().wait_ready(600)
        yield VllmClient(server.url)
        assert "Traceback" not in server.log.read_text()
    finally:
        server.stop()


class VllmClient:
    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body or {}).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def complete(self, tokens: list[int], max_tokens: int = 8, **extra: Any) -> Answer:
        body = {
            "model": MODEL_NAME,
            "prompt": tokens,
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": 1,
            "return_token_ids": True,
            "ignore_eos": True,
            **extra,
        }
        choice = self.post("/v1/completions", body)["choices"][0]
        return Answer(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))

    def metric(self, name: str, **labels: str) -> float:
        """Sum over all series of `name` that carry `labels`."""
        return sum(sample.value for sample in self.series(name, **labels))

    def series(self, name: str, **labels: str) -> list[Sample]:
        """All series of `name` that carry `labels`."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=30) as answer:
            text = answer.read().decode()
        return [
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def empty_hbm(self) -> None:
        """vLLM forgets its own prefix cache; the tiers below keep theirs."""
        wait_until(self._reset, "vLLM has reset its prefix cache")

    def _reset(self) -> bool:
        before = self.metric("vllm:kv_cache_usage_perc")
        self.post("/reset_prefix_cache")
        return before == 0.0
