"""The object tier under a real engine and a real S3 service, which loses, erases, refuses, hangs, and then is gone."""

from __future__ import annotations

import os
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store

from soak.object_store import BUCKET, SECRETS, BreakablePipe, make_bucket, s3_server
from tests.vllm.client import Answer, VllmClient, prompt, wait_until
from tools.server_process import ServerProcess
from tools.vllm_server import VllmOptions, vllm_server

#: Two engines start in the time that one is given elsewhere.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

#: A prompt of 36 blocks: the first 32 of them are an object.
CHUNKS, OBJECT_BLOCKS = 9, 32
LOST_SEED = 50


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
def serving(model: Path, url: str, log: Path, *disk: str) -> Iterator[VllmClient]:
    tiers = f"hbm,host_dram,{'nvme_ssd,' if disk else ''}object_store"
    place = ["--kvbm-object-url", f"s3://{BUCKET}/team", "--kvbm-object-endpoint-url", url]
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


@pytest.fixture
def pipe(service: ServerProcess) -> Iterator[BreakablePipe]:
    between = BreakablePipe(int(service.url.rsplit(":", 1)[1]))
    try:
        yield between
    finally:
        between.close()


def bucket(service: ServerProcess) -> S3Store:
    return S3Store(BUCKET, endpoint=service.url, client_options={"allow_http": True})


def names(service: ServerProcess) -> set[str]:
    return {entry["path"] for page in obstore.list(bucket(service)) for entry in page}


def let_in(service: ServerProcess, count: str) -> None:
    """From now on that many requests, of anybody."""
    text = {"Content-Type": "text/plain"}
    request = urllib.request.Request(f"{service.url}/moto-api/reset-auth", count.encode(), text, method="POST")
    urllib.request.urlopen(request, timeout=30).close()


def nothing_is_held(client: VllmClient) -> bool:
    client.complete([7] * 8, max_tokens=1)
    return client.metric("dynamo_kvbm_pinned_blocks") == 0 == client.metric("vllm:kv_cache_usage_perc")


def test_objects_serve_another_engine_and_a_bad_store_costs_a_miss(
    tiny_model: Path, service: ServerProcess, pipe: BreakablePipe, logs: Path, tmp_path: Path
) -> None:
    disk = ["--kvbm-nvme-path", str(tmp_path), "--kvbm-nvme-gb", "0.2", "--kvbm-nvme-min-touches", "1"]
    with serving(tiny_model, pipe.url, logs / "objects.log", *disk) as client:
        cold = [ask(client, seed) for seed in range(8)]
        stored = "dynamo_kvbm_offloaded_blocks_total"
        step_until_counted(client, stored, 8 * OBJECT_BLOCKS, tier="object_store")
        assert client.metric("dynamo_kvbm_object_failures_total") == 0
        lost = an_upload_is_lost_half_way(client, service, pipe)
    with serving(tiny_model, service.url, logs / "objects-again.log") as client:
        step_until_counted(client, "dynamo_kvbm_recovered_blocks_total", 9, tier="object_store")
        assert [ask(client, seed) for seed in (0, 1, 2, LOST_SEED)] == [*cold[:3], lost]
        assert client.metric("dynamo_kvbm_hit_blocks_total", tier="object_store") == 4 * OBJECT_BLOCKS
        assert client.metric("dynamo_kvbm_load_failures_total") == 0
        what_is_refused_or_gone_is_a_miss(client, service, cold)
        failed = client.metric("dynamo_kvbm_load_failures_total")
        assert service.process is not None
        # It takes connections and says nothing: without a deadline the request would never end.
        service.stand_still()
        assert ask(client, 3) == cold[3]
        step_until_counted(client, "dynamo_kvbm_load_failures_total", OBJECT_BLOCKS, reason="timeout")
        step_until_counted(client, "dynamo_kvbm_object_failures_total", 1, reason="timeout")
        os.kill(service.process.pid, signal.SIGKILL)
        assert [ask(client, seed) for seed in (4, 5)] == cold[4:6]
        step_until_counted(client, "dynamo_kvbm_load_failures_total", failed + 3 * OBJECT_BLOCKS)
        for seed in range(100, 103):
            ask(client, seed)
        step_until_counted(client, "dynamo_kvbm_object_circuits_opened_total", 1)
        assert [ask(client, seed) for seed in range(8)] == cold
        assert client.metric("dynamo_kvbm_hit_blocks_total", tier="object_store") == 4 * OBJECT_BLOCKS
        wait_until(lambda: nothing_is_held(client), "nothing is held", 120)


def an_upload_is_lost_half_way(client: VllmClient, service: ServerProcess, pipe: BreakablePipe) -> Answer:
    """The engine erases what may have come of the object. The next use stores it anew."""
    before = names(service)
    pipe.mode = "lose"
    answer = ask(client, LOST_SEED)
    step_until_counted(client, "dynamo_kvbm_object_failures_total", 1, reason="unreachable")
    pipe.mode = "fine"
    assert pipe.lost_uploads == 1
    wait_until(lambda: nothing_is_held(client) and names(service) == before, "nothing of it is left", 120)

    def is_there() -> bool:
        assert ask(client, LOST_SEED) == answer
        return len(names(service)) == len(before) + 1

    wait_until(is_there, "it is stored anew", 120)
    return answer


def what_is_refused_or_gone_is_a_miss(client: VllmClient, service: ServerProcess, cold: list[Answer]) -> None:
    let_in(service, "0")
    assert ask(client, 6) == cold[6]
    step_until_counted(client, "dynamo_kvbm_load_failures_total", OBJECT_BLOCKS, reason="forbidden")
    step_until_counted(client, "dynamo_kvbm_object_failures_total", 1, reason="forbidden")
    let_in(service, "inf")
    obstore.delete(bucket(service), sorted(names(service)))
    assert ask(client, 7) == cold[7]
    step_until_counted(client, "dynamo_kvbm_load_failures_total", OBJECT_BLOCKS, reason="not_found")
    step_until_counted(client, "dynamo_kvbm_object_failures_total", 1, reason="not_found")
    wait_until(lambda: nothing_is_held(client), "nothing is held", 120)
