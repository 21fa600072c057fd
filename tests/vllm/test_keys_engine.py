"""The same prompt with and without an adapter, and with other salts: a real vLLM mixes no KV of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vllm.client import Answer, VllmClient, prompt
from tests.vllm.lora_adapter import make_adapter
from tools.vllm_server import VllmOptions, vllm_server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

BLOCKS_PER_PROMPT = 28
ADAPTERS = ("formal", "casual")


@pytest.fixture(scope="module")
def client(tiny_model: Path, logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmClient]:
    folder = tmp_path_factory.mktemp("adapters")
    adapters = [f"{name}={make_adapter(folder / name, tiny_model, seed)}" for seed, name in enumerate(ADAPTERS)]
    tiers = ["--kv-connector", "dynamo", "--kvbm-storage-tiers", "hbm,host_dram", "--kvbm-host-dram-gb", "0.1"]
    lora = ["--kvbm-load-gate", "off", "--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--lora-modules"]
    options = VllmOptions(extra=[*tiers, *lora, *adapters])
    server = vllm_server("vllm-keys", tiny_model, logs / "vllm-keys.log", options)
    try:
        server.start().wait_ready(600)
        yield VllmClient(server.url)
        assert "Traceback" not in server.log.read_text()
    finally:
        server.stop()


def loaded(client: VllmClient) -> float:
    return client.metric("dynamo_kvbm_hit_blocks_total", tier="host_dram")


def test_adapters_and_salts_have_blocks_of_their_own(client: VllmClient) -> None:
    """Six ways to ask: cold, none finds what another one left; then each finds all of its own."""
    text = prompt(1)
    ways: dict[str, Callable[[], Answer]] = {
        "plain": lambda: client.complete(text),
        "formal": lambda: client.complete(text, model="formal"),
        "casual": lambda: client.complete(text, model="casual"),
        "salted": lambda: client.complete(text, cache_salt="a tenant"),
        "other salt": lambda: client.complete(text, cache_salt="another tenant"),
        "salted, formal": lambda: client.complete(text, model="formal", cache_salt="a tenant"),
    }
    cold = {name: ask() for name, ask in ways.items()}
    assert loaded(client) == 0 == client.metric("vllm:prefix_cache_hits_total"), "it was given another one's blocks"
    assert cold["plain"] == cold["salted"] == cold["other salt"]
    assert cold["formal"] == cold["salted, formal"]
    assert len({cold[name].tokens for name in ("plain", *ADAPTERS)}) == 3, "the adapters change nothing"
    client.empty_hbm()
    for name, ask in reversed(ways.items()):
        before = loaded(client)
        assert ask() == cold[name], name
        assert loaded(client) - before == BLOCKS_PER_PROMPT, name
    assert client.metric("dynamo_kvbm_load_failures_total") == 0
