"""`--kvbm-compression` on a real vLLM: evicted, reloaded, counted, and never mixed with bytes of another kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_connectors.tiers.nvme import slot_bytes
from tests.vllm.client import Answer, VllmClient, prompt
from tests.vllm.slab_damage import damage_every_payload
from tools.server_process import ServerProcess
from tools.vllm_server import VllmOptions, vllm_server

pytestmark = pytest.mark.engine

#: 28 blocks a prompt: six prompts fill the 160 blocks of HBM, ten the 304 of DRAM.
BLOCKS_PER_PROMPT = 28
#: 4 layers, 2 heads of 64, 32 tokens: one byte for each of K and V, and 16 bytes of scales a layer.
ROW_BYTES = 4 * (2 * 2 * 64 * 32 + 16)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of both kinds, one after the other."""
    return tmp_path_factory.mktemp("compressed")


@pytest.fixture(scope="module", params=["fp8", "int8"])
def served(
    request: pytest.FixtureRequest, tiny_model: Path, logs: Path, directory: Path
) -> Iterator[tuple[ServerProcess, Path]]:
    """The engine and its slab. It has half of what `test_engine` has below HBM, and room for as many blocks."""
    before = set(directory.glob("*.slab"))
    tiers = ["--kv-connector", "dynamo", "--kvbm-storage-tiers", "hbm,host_dram,nvme_ssd"]
    sizes = ["--kvbm-host-dram-gb", "0.01", "--kvbm-nvme-path", str(directory), "--kvbm-nvme-gb", "0.025"]
    rules = ["--kvbm-nvme-min-touches", "1", "--kvbm-load-gate", "off", "--kvbm-compression", request.param]
    log = logs / f"vllm-{request.param}.log"
    server = vllm_server(f"vllm-{request.param}", tiny_model, log, VllmOptions(extra=[*tiers, *sizes, *rules]))
    try:
        server.start().wait_ready()
        (slab,) = set(directory.glob("*.slab")) - before
        yield server, slab
    finally:
        server.stop()


@pytest.fixture
def client(served: tuple[ServerProcess, Path]) -> VllmClient:
    return VllmClient(served[0].url)


def hits(client: VllmClient, tier: str) -> float:
    return client.metric("dynamo_kvbm_hit_blocks_total", tier=tier)


def fill(client: VllmClient, first_seed: int, count: int) -> list[Answer]:
    return [client.complete(prompt(seed)) for seed in range(first_seed, first_seed + count)]


def test_what_the_other_kind_left_on_this_disk_is_not_found(
    client: VllmClient, served: tuple[ServerProcess, Path]
) -> None:
    assert client.metric("dynamo_kvbm_recovered_blocks_total") == 0
    capacity = served[1].stat().st_size // slot_bytes(ROW_BYTES)
    assert capacity == 25_000_000 // slot_bytes(ROW_BYTES) > 600, "capacities do not follow the compressed size"


def test_blocks_come_back_from_both_tiers_near_what_they_were_and_every_time_the_same(
    client: VllmClient, served: tuple[ServerProcess, Path]
) -> None:
    """And damaged ones not at all: what is computed instead is exact."""
    cold = fill(client, 1000, 8)
    dram, disk, read = hits(client, "host_dram"), hits(client, "nvme_ssd"), _read(client)
    from_dram = fill(client, 1000, 8)
    assert hits(client, "host_dram") - dram == 8 * BLOCKS_PER_PROMPT
    assert hits(client, "nvme_ssd") == disk
    assert _read(client) - read == 8 * BLOCKS_PER_PROMPT * ROW_BYTES
    fill(client, 1100, 12)
    disk = hits(client, "nvme_ssd")
    assert fill(client, 1000, 4) == from_dram[:4]
    assert hits(client, "nvme_ssd") - disk == 4 * BLOCKS_PER_PROMPT
    # By chance one in 512 would. Random weights as wide as this model's make much of little: see docs/benchmarks.md.
    same = sum(one.tokens[0] == other.tokens[0] for one, other in zip(cold, from_dram, strict=True))
    assert same >= 2, "the answers have little to do with the computed ones"
    assert from_dram != cold, "nothing was compressed"
    damage_every_payload(served[1], ROW_BYTES)
    damaged = client.metric("dynamo_kvbm_load_failures_total", reason="bad_checksum")
    assert fill(client, 1004, 2) == cold[4:6]
    assert client.metric("dynamo_kvbm_load_failures_total", reason="bad_checksum") > damaged


def _read(client: VllmClient) -> float:
    return client.metric("dynamo_kvbm_onboarded_bytes_total")
