"""A real vLLM on two ranks: one index in the scheduler over two shards (TP), and two engines apart (DP)."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from tests.vllm.client import Answer, VllmClient, prompt, serving, wait_until
from tests.vllm.slab_damage import damage_every_payload
from tools.server_process import ServerProcess
from tools.vllm_server import MODEL_NAME, VllmOptions, vllm_server

#: Two engines start in the time that one is given elsewhere.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

BLOCKS_PER_PROMPT = 28
#: What one of two tensor-parallel ranks holds of a block.
SHARD_BYTES = 32768


def ranks_of(model: Path, log: Path, disk: Path, sizes: tuple[str, str], *ranks: str) -> ServerProcess:
    """HBM holds two prompts."""
    tiers = ["--kv-connector", "dynamo", "--kvbm-storage-tiers", "hbm,host_dram,nvme_ssd", "--kvbm-host-dram-gb"]
    tiers += [sizes[0], "--kvbm-nvme-gb", sizes[1], "--kvbm-nvme-path", str(disk)]
    rules = ["--kvbm-nvme-min-touches", "1", "--kvbm-load-gate", "off"]
    options = VllmOptions(hbm_blocks=64, max_model_tokens=1024, extra=[*tiers, *rules, *ranks])
    server = vllm_server("vllm-ranks", model, log, options)
    # By itself vLLM binds each rank to a NUMA node of its own, and refuses to start where there are fewer.
    return replace(server, env={**server.env, "VLLM_CPU_OMP_THREADS_BIND": "nobind"})


def hits(client: VllmClient, tier: str, **labels: str) -> float:
    return client.metric("dynamo_kvbm_hit_blocks_total", tier=tier, **labels)


def ask(client: VllmClient, seeds: range) -> list[Answer]:
    return [client.complete(prompt(seed)) for seed in seeds]


def store(client: VllmClient, seed: int) -> Answer:
    """Returns when the disks have all blocks, which a small and busy host memory would drop."""
    before = client.metric("dynamo_kvbm_offloaded_blocks_total", tier="nvme_ssd")
    answer = client.complete(prompt(seed))

    def has_sunk() -> bool:
        return client.metric("dynamo_kvbm_offloaded_blocks_total", tier="nvme_ssd") - before >= BLOCKS_PER_PROMPT

    wait_until(has_sunk, "the disks have the prompt", 120)
    return answer


def test_shards_of_two_workers_come_back_together_or_not_at_all(tiny_model: Path, logs: Path, tmp_path: Path) -> None:
    # On each worker: 61 blocks in DRAM, two prompts; 271 on disk, nine.
    server = ranks_of(tiny_model, logs / "tp.log", tmp_path, ("0.004", "0.02"), "--tensor-parallel-size", "2")
    with serving(server) as client:
        cold = [store(client, seed) for seed in range(5)]
        client.empty_hbm()
        assert client.complete(prompt(4)) == cold[4]
        assert hits(client, "host_dram") == BLOCKS_PER_PROMPT
        assert client.complete(prompt(0)) == cold[0]
        assert hits(client, "nvme_ssd") == BLOCKS_PER_PROMPT
        slabs = sorted(tmp_path.glob("*.slab"))
        assert len(slabs) == 2, "each worker keeps its own shard"
        client.empty_hbm()
        damage_every_payload(slabs[1], SHARD_BYTES)
        assert ask(client, range(1, 3)) == cold[1:3]
        assert client.metric("dynamo_kvbm_load_failures_total", reason="bad_checksum") >= BLOCKS_PER_PROMPT
        assert ask(client, range(1, 2)) == cold[1:2]
        wait_until(lambda: nothing_is_held(client), "nothing is held")


def test_data_parallel_engines_keep_apart(tiny_model: Path, logs: Path, tmp_path: Path) -> None:
    """They have one namespace and one directory: each must find its own slab, and only what it put there.

    Host memory is smaller than one prompt here: 22 blocks of 28, its head.
    """
    ranks = ["--data-parallel-size", "2", "--api-server-count", "1"]
    with serving(ranks_of(tiny_model, logs / "dp.log", tmp_path, ("0.0015", "0.04"), *ranks)) as client:
        cold = [ask_rank(client, 0, seed) for seed in range(2)]
        assert len(list(tmp_path.glob("*.slab"))) == 2
        # The other engine computes them too, though its neighbour has them all.
        assert [ask_rank(client, 1, seed) for seed in range(2)] == cold
        assert hits(client, "host_dram") + hits(client, "nvme_ssd") == 0
        client.empty_hbm()
        for rank in (0, 1):
            assert ask_rank(client, rank, 1) == cold[1]
            found = hits(client, "host_dram", engine=str(rank)) + hits(client, "nvme_ssd", engine=str(rank))
            assert 0 < found < 2 * BLOCKS_PER_PROMPT
        wait_until(lambda: nothing_is_held(client), "nothing is held")


def ask_rank(client: VllmClient, rank: int, seed: int) -> tuple[int, ...]:
    body = {"model": MODEL_NAME, "prompt": prompt(seed), "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    headers = {"content-type": "application/json", "X-data-parallel-rank": str(rank)}
    text = json.dumps({**body, "return_token_ids": True}).encode()
    with urllib.request.urlopen(
        urllib.request.Request(client.url + "/v1/completions", text, headers), timeout=120
    ) as answer:
        return tuple(json.loads(answer.read())["choices"][0]["token_ids"])


def nothing_is_held(client: VllmClient) -> bool:
    """Gauges are published by steps."""
    for rank in {sample.labels["engine"] for sample in client.series("vllm:kv_cache_usage_perc")}:
        ask_rank(client, int(rank), 99)
    return client.metric("dynamo_kvbm_pinned_blocks") == 0 == client.metric("vllm:kv_cache_usage_perc")
