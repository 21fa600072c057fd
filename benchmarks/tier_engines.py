"""vLLM and SGLang as `tier_ttft` sees them: one way to start, to ask and to count, for both."""

from __future__ import annotations

import json
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from soak.object_store import BUCKET, SECRETS
from tools.server_process import ServerProcess
from tools.sglang_server import PAGE_TOKENS, sglang_server
from tools.vllm_server import BLOCK_TOKENS, CHUNK_TOKENS, MODEL_NAME, VllmOptions, vllm_server

#: Ends four tokens behind a prefill chunk, so that the last chunk has the same shape cold and on a hit.
PROMPT_TOKENS = 16 * CHUNK_TOKENS + 4
MAX_TOKENS = 8

Prompt = list[int]


class Answer(NamedTuple):
    tokens: tuple[int, ...]
    ttft_seconds: float


class Engine(ABC):
    """One kind of engine over one model."""

    name: str
    block_tokens: int

    def __init__(self, model: Path) -> None:
        self.model = model

    @abstractmethod
    def server(self, folder: Path, tiers: tuple[str, ...], s3_url: str) -> ServerProcess:
        """Not started. Its disk and its bucket are those of the servers before it."""

    @abstractmethod
    def request(self, prompt: Prompt) -> tuple[str, dict[str, Any]]:
        """Path and body of a streamed, greedy completion."""

    @abstractmethod
    def new_tokens(self, chunk: dict[str, Any], so_far: int) -> list[int]: ...

    @abstractmethod
    def empty_hbm(self, url: str, filler: Callable[[], Prompt]) -> None: ...

    def ask(self, url: str, prompt: Prompt) -> Answer:
        path, body = self.request(prompt)
        request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
        tokens: list[int] = []
        started, first = time.perf_counter(), 0.0
        with urllib.request.urlopen(request, timeout=120) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    tokens += self.new_tokens(json.loads(line[6:]), len(tokens))
                    first = first or time.perf_counter() - started
        return Answer(tuple(tokens), first)

    def step(self, url: str) -> None:
        """Counts are published by steps, and a step is something to compute."""
        self.ask(url, [7] * 8)

    def hit_blocks(self, url: str, tier: str) -> float:
        return _metric(url, "dynamo_kvbm_hit_blocks_total", tier=tier)

    def offloaded(self, url: str, tier: str) -> float:
        return _metric(url, "dynamo_kvbm_offloaded_blocks_total", tier=tier)

    def knows(self, url: str, tier: str) -> bool:
        """Whether it has found out what the servers before it left in `tier`."""
        return _metric(url, "dynamo_kvbm_recovered_blocks_total", tier=tier) > 0


class Vllm(Engine):
    name, block_tokens = "vLLM", BLOCK_TOKENS

    def server(self, folder: Path, tiers: tuple[str, ...], s3_url: str) -> ServerProcess:
        extra = ["--kv-connector", "dynamo", "--kvbm-storage-tiers", ",".join(("hbm", "host_dram", *tiers))]
        extra += ["--kvbm-host-dram-gb", "0.2", "--kvbm-load-gate", "off"]
        if "nvme_ssd" in tiers:
            extra += [*_disk_flags(folder / "kv"), "--kvbm-nvme-min-touches", "1"]
        if "object_store" in tiers:
            extra += _object_flags(folder, s3_url)
        server = vllm_server("vllm", self.model, folder / "vllm.log", VllmOptions(hbm_blocks=600, extra=extra))
        server.env = {**server.env, **SECRETS}
        return server

    def request(self, prompt: Prompt) -> tuple[str, dict[str, Any]]:
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True}
        return "/v1/completions", {**body, "return_token_ids": True, "ignore_eos": True}

    def new_tokens(self, chunk: dict[str, Any], so_far: int) -> list[int]:
        return [token for choice in chunk["choices"] for token in choice.get("token_ids") or ()]

    def empty_hbm(self, url: str, filler: Callable[[], Prompt]) -> None:
        urllib.request.urlopen(urllib.request.Request(url + "/reset_prefix_cache", method="POST"), timeout=60).close()


class Sglang(Engine):
    """Its DRAM is its own second level. Its object store lies below the disk: no disk means an empty one."""

    name, block_tokens = "SGLang", PAGE_TOKENS

    def server(self, folder: Path, tiers: tuple[str, ...], s3_url: str) -> ServerProcess:
        extra = ["--hicache-storage-backend", "dynamo", "--enable-hierarchical-cache", "--hicache-ratio", "2"]
        extra += ["--max-total-tokens", "16384", "--hicache-storage-prefetch-policy", "wait_complete"]
        extra += ["--enable-metrics", *_disk_flags(folder / ("kv" if "nvme_ssd" in tiers else "empty"))]
        if "object_store" in tiers:
            extra += _object_flags(folder, s3_url)
        server = sglang_server("sglang", self.model, folder / "sglang.log", extra)
        server.env = {**server.env, **SECRETS}
        return server

    def request(self, prompt: Prompt) -> tuple[str, dict[str, Any]]:
        sampling = {"max_new_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
        return "/generate", {"input_ids": prompt, "sampling_params": sampling, "stream": True}

    def new_tokens(self, chunk: dict[str, Any], so_far: int) -> list[int]:
        tokens: list[int] = chunk["output_ids"]
        return tokens[so_far:]

    def empty_hbm(self, url: str, filler: Callable[[], Prompt]) -> None:
        """SGLang cannot be told to; other prompts push the old ones down to its host memory."""
        for _ in range(16384 // PROMPT_TOKENS + 1):
            self.ask(url, filler())

    def hit_blocks(self, url: str, tier: str) -> float:
        if tier == "host_dram":
            return _metric(url, "sglang:cached_tokens_total", cache_source="host") / PAGE_TOKENS
        return super().hit_blocks(url, tier)


def _disk_flags(directory: Path) -> list[str]:
    directory.mkdir(parents=True, exist_ok=True)
    return ["--kvbm-nvme-path", str(directory), "--kvbm-nvme-gb", "0.2"]


def _object_flags(folder: Path, s3_url: str) -> list[str]:
    flags = ["--kvbm-object-url", f"s3://{BUCKET}/{folder.name}", "--kvbm-object-endpoint-url", s3_url]
    return [*flags, "--kvbm-object-gb", "1", "--kvbm-object-min-touches", "1"]


def _metric(url: str, name: str, **labels: str) -> float:
    with urllib.request.urlopen(url + "/metrics", timeout=30) as answer:
        text = answer.read().decode()
    families = text_string_to_metric_families(text)
    samples = (sample for family in families for sample in family.samples if sample.name == name)
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


ENGINES: dict[str, type[Engine]] = {"vllm": Vllm, "sglang": Sglang}
