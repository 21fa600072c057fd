"""The object tier under a real engine and a real S3 service, which then hangs, and then is gone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from soak.object_store import BUCKET, SECRETS, make_bucket, s3_server
from tests.vllm.client import Answer, VllmClient, prompt, wait_until
from tools.server_process import ServerProcess
from tools.vllm_server import VllmOptions, vllm_server

pytestmark = pytest.mark.engine

#: A prompt of 36 blocks: the first 32 of them are an object.
CHUNKS, OBJECT_BLOCKS = 9, 32


@pytest.fixture
def service(logs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerProcess]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    server = s3_server(logs / "s3.log")
    try:
        server.start().wait_ready()
        make_bucket(server.url)
        yield server
    finally:
        server.stop()


@contextmanager
def serving(model: Path, service: ServerProcess, log: Path, *disk: str) -> Iterator[VllmClient]:
    tiers = f"hbm,host_dram,{'nvme_ssd,' if disk else ''}object_store"
    place = ["--kvbm-object-url", f"s3://{BUCKET}/team", "--kvbm-object-endpoint-url", service.url]
    # Every chunk goes up, and every hit is loaded: the test counts them. The deadline is long for a busy machine.
    rules = ["--kvbm-object-min-touches", "1", "--kvbm-load-gate", "off", "--kvbm-object-deadline-ms", "5000"]
    sizes = ["--kvbm-host-dram-gb", "0.2", "--kvbm-object-gb", "1"]
    flags = ["--kv-connector", "dynamo", "--kvbm-storage-tiers", tiers, *disk, *place, *rules, *sizes]
    server = vllm_server("vllm-objects", model, log, VllmOptions(extra=flags))
    try:
        server.start().wait_ready()
        yield VllmClient(server.url)
        assert "Traceback" not in server.log.read_text()
    finally:
        server.stop()


def ask(client: VllmClient, seed: int) -> Answer:
    return client.complete(prompt(seed, CHUNKS))


def step_until_counted(client: VllmClient, name: str, least: float, **labels: str) -> None:
    """Counts are published by steps, and a step is something to compute."""

    def is_counted() -> bool:
        client.complete([7] * 8, max_tokens=1)
        return client.metric(name, **labels) >= least

    wait_until(is_counted, f"{name} {labels} is {least:g}")


def test_objects_serve_another_engine_and_a_dead_store_costs_a_miss(
    tiny_model: Path, service: ServerProcess, logs: Path, tmp_path: Path
) -> None:
    disk = ["--kvbm-nvme-path", str(tmp_path), "--kvbm-nvme-gb", "0.2", "--kvbm-nvme-min-touches", "1"]
    with serving(tiny_model, service, logs / "objects.log", *disk) as client:
        cold = [ask(client, seed) for seed in range(6)]
        stored = "dynamo_kvbm_offloaded_blocks_total"
        step_until_counted(client, stored, 6 * OBJECT_BLOCKS, tier="object_store")
        assert client.metric("dynamo_kvbm_object_failures_total") == 0
    with serving(tiny_model, service, logs / "objects-again.log") as client:
        step_until_counted(client, "dynamo_kvbm_recovered_blocks_total", 6, tier="object_store")
        assert [ask(client, seed) for seed in range(3)] == cold[:3]
        assert client.metric("dynamo_kvbm_hit_blocks_total", tier="object_store") == 3 * OBJECT_BLOCKS
        assert client.metric("dynamo_kvbm_load_failures_total") == 0
        assert service.process is not None
        # It takes connections and says nothing: without a deadline the request would never end.
        os.kill(service.process.pid, signal.SIGSTOP)
        assert ask(client, 3) == cold[3]
        step_until_counted(client, "dynamo_kvbm_load_failures_total", OBJECT_BLOCKS, reason="timeout")
        step_until_counted(client, "dynamo_kvbm_object_failures_total", 1, reason="timeout")
        os.kill(service.process.pid, signal.SIGKILL)
        assert [ask(client, seed) for seed in (4, 5)] == cold[4:]
        step_until_counted(client, "dynamo_kvbm_load_failures_total", 3 * OBJECT_BLOCKS)
        for seed in range(100, 103):
            ask(client, seed)
        step_until_counted(client, "dynamo_kvbm_object_circuits_opened_total", 1)
        assert [ask(client, seed) for seed in range(6)] == cold
        assert client.metric("dynamo_kvbm_hit_blocks_total", tier="object_store") == 3 * OBJECT_BLOCKS
