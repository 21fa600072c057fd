"""A model with sliding windows on a real engine, killed and started again: what comes back is what was computed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.vllm.client import Answer, VllmClient, prompt, wait_until
from tests.vllm.hybrid_model import make_hybrid_model
from tools.server_process import ServerProcess
from tools.vllm_server import VllmOptions, vllm_server

pytestmark = pytest.mark.engine

SEEDS = range(6)


@pytest.fixture(scope="module")
def hybrid_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hybrid_model(tmp_path_factory.mktemp("hybrid"), tiny_model)


@contextmanager
def serving(model: Path, slabs: Path, log: Path) -> Iterator[tuple[ServerProcess, VllmClient]]:
    """100 HBM blocks: three prompts fill them, so that each answer evicts another's blocks."""
    tiers = ["--kv-connector", "dynamo", "--kvbm-storage-tiers", "hbm,host_dram,nvme_ssd", "--kvbm-host-dram-gb", "0.2"]
    disk = ["--kvbm-nvme-path", str(slabs), "--kvbm-nvme-gb", "0.2", "--kvbm-nvme-min-touches", "1"]
    settings = [*tiers, *disk, "--kvbm-load-gate", "off"]
    # vLLM starts only if one request of the greatest length fits.
    options = VllmOptions(hbm_blocks=100, max_model_tokens=2048, extra=settings)
    server = vllm_server("vllm-hybrid", model, log, options)
    try:
        server.start().wait_ready()
        yield server, VllmClient(server.url)
    finally:
        server.stop()


def answers(client: VllmClient) -> list[Answer]:
    return [client.complete(prompt(seed)) for seed in SEEDS]


def hits(client: VllmClient, tier: str) -> float:
    return client.metric("dynamo_kvbm_hit_blocks_total", tier=tier)


def test_windows_come_back_from_host_memory_and_after_a_kill_from_disk(
    hybrid_model: Path, logs: Path, tmp_path: Path
) -> None:
    with serving(hybrid_model, tmp_path, logs / "hybrid.log") as (server, client):
        cold = answers(client)
        assert answers(client) == cold
        # Per prompt: a full group of 28 blocks, and two groups with the last three, which hold the window.
        assert hits(client, "host_dram") >= len(SEEDS) * (28 + 2 * 3)
        assert "3 KV cache groups" not in server.log.read_text()
        wait_until(lambda: client.metric("vllm:kv_cache_usage_perc") == 0.0, "no HBM block is in use")
        with ThreadPoolExecutor(4) as pool:
            under_load = [pool.submit(_ignore_the_end, client, seed) for seed in range(100, 104)]
            wait_until(lambda: client.metric("vllm:num_requests_running") > 0, "requests are running")
            server.kill()
            for one in under_load:
                one.result()
        gc.collect()  # connections that the killed server has cut hang on the errors that tell of it
    with serving(hybrid_model, tmp_path, logs / "hybrid-again.log") as (server, client):
        assert answers(client) == cold
        assert client.metric("dynamo_kvbm_recovered_blocks_total", tier="nvme_ssd") > 0
        assert hits(client, "nvme_ssd") >= len(SEEDS) * (28 + 2 * 3)
        assert client.metric("dynamo_kvbm_load_failures_total") == 0
        assert "Traceback" not in server.log.read_text()


def _ignore_the_end(client: VllmClient, seed: int) -> None:
    try:
        client.complete(prompt(seed), max_tokens=400)
    except OSError:  # the server was killed
        return
