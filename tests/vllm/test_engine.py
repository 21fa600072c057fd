"""The main promise on a real vLLM: what comes back from a lower tier is what was computed, bit for bit."""

from __future__ import annotations

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPResponse
from pathlib import Path

import msgspec
import pytest
import zmq

from tests.vllm.client import Answer, VllmClient, prompt, wait_until
from tests.vllm.slab_damage import damage_every_payload
from tools.server_process import ServerProcess
from tools.vllm_server import BLOCK_TOKENS, MODEL_NAME

pytestmark = pytest.mark.engine

#: 28 blocks a prompt: six prompts fill the 160 blocks of HBM, eleven the 305 of DRAM, twenty-five the disk.
BLOCKS_PER_PROMPT = 28
#: One block of the tiny model over all layers.
ROW_BYTES = 65536


def hits(client: VllmClient, tier: str) -> float:
    return client.metric("dynamo_kvbm_hit_blocks_total", tier=tier)


def wait_idle(client: VllmClient) -> None:
    wait_until(lambda: client.metric("vllm:kv_cache_usage_perc") == 0.0, "no HBM block is in use")


def fill(client: VllmClient, first_seed: int, count: int) -> list[Answer]:
    return [client.complete(prompt(seed)) for seed in range(first_seed, first_seed + count)]


def test_a_block_evicted_from_hbm_comes_back_from_dram_bit_for_bit(client: VllmClient) -> None:
    cold = fill(client, 1000, 8)
    hits_before = hits(client, "host_dram")
    warm = fill(client, 1000, 8)
    assert warm == cold
    assert hits(client, "host_dram") - hits_before == 8 * BLOCKS_PER_PROMPT
    assert client.metric("vllm:external_prefix_cache_hits_total") >= 8 * BLOCKS_PER_PROMPT * BLOCK_TOKENS


def test_the_computed_tail_of_an_answer_is_kept_too(client: VllmClient) -> None:
    first = client.complete(prompt(1500), max_tokens=2 * BLOCK_TOKENS)
    fill(client, 1600, 8)
    conversation = prompt(1500) + list(first.tokens)
    hits_before = hits(client, "host_dram") + hits(client, "nvme_ssd")
    client.complete(conversation, max_tokens=1)
    blocks = (len(conversation) - 1) // BLOCK_TOKENS
    assert hits(client, "host_dram") + hits(client, "nvme_ssd") - hits_before == blocks > BLOCKS_PER_PROMPT


def test_a_block_evicted_from_dram_comes_back_from_disk_bit_for_bit(client: VllmClient) -> None:
    cold = fill(client, 2000, 20)
    hits_before = hits(client, "nvme_ssd")
    assert fill(client, 2000, 4) == cold[:4]
    assert hits(client, "nvme_ssd") - hits_before == 4 * BLOCKS_PER_PROMPT


def test_damaged_bytes_on_disk_are_recomputed_and_counted(client: VllmClient, nvme_directory: Path) -> None:
    cold = fill(client, 3000, 20)
    wait_idle(client)
    (slab,) = nvme_directory.glob("*.slab")
    damage_every_payload(slab, ROW_BYTES)
    damaged_before = client.metric("dynamo_kvbm_load_failures_total", reason="bad_checksum")
    assert fill(client, 3000, 4) == cold[:4]
    assert client.metric("dynamo_kvbm_load_failures_total", reason="bad_checksum") > damaged_before


def test_requests_at_the_same_time_get_their_own_answers(client: VllmClient) -> None:
    seeds = list(range(4000, 4012))
    alone = {seed: client.complete(prompt(seed), max_tokens=1) for seed in seeds}
    with ThreadPoolExecutor(8) as pool:
        order = seeds + seeds[::-1] + seeds[::2] + seeds[1::2]
        together = list(pool.map(lambda seed: (seed, client.complete(prompt(seed), max_tokens=1)), order))
    for seed, answer in together:
        # A batch rounds differently from a single request, on stock vLLM too; another prompt's KV is far off.
        assert answer.tokens == alone[seed].tokens or abs(answer.logprobs[0] - alone[seed].logprobs[0]) < 0.2, seed
    wait_idle(client)


def test_clients_that_leave_while_blocks_are_loaded_leave_nothing_behind(client: VllmClient) -> None:
    cold = fill(client, 5000, 10)
    for seed in range(5000, 5010):
        body = {"model": MODEL_NAME, "prompt": prompt(seed), "max_tokens": 200, "stream": True, "ignore_eos": True}
        request = urllib.request.Request(
            client.url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=60).close()
    wait_until(lambda: client.metric("vllm:num_requests_running") == 0, "the aborted requests are gone")
    wait_idle(client)
    assert fill(client, 5000, 10) == cold


def test_resetting_the_connector_forgets_every_block(client: VllmClient) -> None:
    cold = client.complete(prompt(6000))
    wait_idle(client)
    client.post("/reset_prefix_cache?reset_external=true")
    before = hits(client, "host_dram") + hits(client, "nvme_ssd")
    assert client.complete(prompt(6000)) == cold
    assert hits(client, "host_dram") + hits(client, "nvme_ssd") == before


def test_routers_hear_of_blocks_below_hbm(client: VllmClient, events_port: int) -> None:
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.setsockopt(zmq.LINGER, 0)
        subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        subscriber.setsockopt(zmq.RCVTIMEO, 10_000)
        subscriber.connect(f"tcp://127.0.0.1:{events_port}")
        stored: dict[str, list[dict[str, object]]] = {"GPU": [], "CPU": []}
        probe_seed = 7100
        while not subscriber.poll(200):
            # A subscription takes effect some time after connect; until then events are lost.
            client.complete(prompt(probe_seed, chunks=1), max_tokens=1)
            probe_seed += 1
        wait_idle(client)
        while subscriber.poll(200):
            subscriber.recv_multipart()
        wanted = prompt(7000)
        client.complete(wanted)
        client.complete(prompt(7001), max_tokens=1)
        while len(stored["CPU"]) < BLOCKS_PER_PROMPT:
            _, _, payload = subscriber.recv_multipart()
            for event in msgspec.msgpack.decode(payload)[1]:
                if event["type"] == "BlockStored" and event["medium"] in stored:
                    stored[event["medium"]].append(event)
    tokens = [token for event in stored["CPU"][:BLOCKS_PER_PROMPT] for token in event["token_ids"]]
    assert tokens == wanted[: BLOCKS_PER_PROMPT * BLOCK_TOKENS]
    on_gpu = {hash_ for event in stored["GPU"] for hash_ in event["block_hashes"]}
    assert {event["block_hashes"][0] for event in stored["CPU"]} <= on_gpu


def test_utilisation_is_published_under_the_name_operators_know(client: VllmClient, engine: ServerProcess) -> None:
    assert 0 < client.metric("dynamo_kvbm_memory_utilization_percent", tier="host_dram") <= 100
    assert "Traceback" not in engine.log.read_text()


def test_requests_that_share_a_prefix_share_its_load(client: VllmClient) -> None:
    text = prompt(8000)
    alone = client.complete(text, max_tokens=1)
    fill(client, 8100, 8)
    read_before = client.metric("dynamo_kvbm_onboarded_bytes_total")
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda _: client.complete(text, max_tokens=1), range(8)))
    # A batch rounds differently from a single request, on stock vLLM too; another prompt's KV is far off.
    assert all(abs(answer.logprobs[0] - alone.logprobs[0]) < 0.2 for answer in together)
    read = client.metric("dynamo_kvbm_onboarded_bytes_total") - read_before
    assert read == BLOCKS_PER_PROMPT * ROW_BYTES


def test_hints_reach_the_tiers_and_bad_ones_hurt_nobody(client: VllmClient) -> None:
    stored_before = client.metric("dynamo_kvbm_offloaded_blocks_total", tier="host_dram")
    ignored_before = client.metric("dynamo_kvbm_ignored_hints_total")
    hidden = client.complete(prompt(8200), kv_transfer_params={"kvbm_no_store": True, "somebody_else": 1})
    wait_idle(client)
    assert client.metric("dynamo_kvbm_offloaded_blocks_total", tier="host_dram") == stored_before
    bad = {"kvbm_pin_ttl_seconds": "soon", "kvbm_prefetch": [], "kvbm_whatever": None}
    assert client.complete(prompt(8200), kv_transfer_params=bad) == hidden
    assert client.metric("dynamo_kvbm_ignored_hints_total") - ignored_before == 3


def test_a_hinted_request_comes_up_to_host_memory_before_it_is_scheduled(client: VllmClient) -> None:
    """It waits behind requests that fill HBM; meanwhile its blocks go from disk to host memory and are found there."""
    cold = fill(client, 8600, 20)[0]
    wait_idle(client)

    def came_up() -> float:
        return client.metric("dynamo_kvbm_prefetched_blocks_total", tier="host_dram")

    came_before, dram_before, disk_before = came_up(), hits(client, "host_dram"), hits(client, "nvme_ssd")
    with ExitStack() as others, ThreadPoolExecutor(1) as pool:
        for seed in range(8700, 8705):
            others.enter_context(_endless(client, prompt(seed)))
        # So little is free that 28 blocks do not fit.
        wait_until(lambda: client.metric("vllm:kv_cache_usage_perc") > 0.84, "HBM is full", 120)
        hint = {"kvbm_prefetch": True}
        asked = pool.submit(client.complete, prompt(8600), max_tokens=1, kv_transfer_params=hint)
        try:
            wait_until(
                lambda: came_up() - came_before >= BLOCKS_PER_PROMPT, "the disk's blocks are in host memory", 120
            )
            assert not asked.done(), "it was scheduled before"
            assert hits(client, "host_dram") + hits(client, "nvme_ssd") == dram_before + disk_before
        finally:
            others.close()
        hinted = asked.result()
    # A batch rounds differently from a single request, on stock vLLM too; another prompt's KV is far off.
    assert abs(hinted.logprobs[0] - cold.logprobs[0]) < 0.2
    assert hits(client, "host_dram") - dram_before == BLOCKS_PER_PROMPT
    assert hits(client, "nvme_ssd") == disk_before


def _endless(client: VllmClient, tokens: list[int]) -> HTTPResponse:
    """A request that goes on until its stream is closed, and stores nothing."""
    body = {"model": MODEL_NAME, "prompt": tokens, "max_tokens": 2000, "stream": True, "ignore_eos": True}
    body["kv_transfer_params"] = {"kvbm_no_store": True}
    request = urllib.request.Request(
        client.url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    answer: HTTPResponse = urllib.request.urlopen(request, timeout=60)
    return answer


@pytest.mark.parametrize("level", [1, 2])
def test_nothing_from_before_a_sleep_is_served_after_it(client: VllmClient, level: int) -> None:
    """The weights may be others when the engine wakes: vLLM resets every cache, and the disk is made to forget."""
    cold = fill(client, 8300 + level, 2)
    client.post(f"/sleep?level={level}")
    client.post("/wake_up")
    before = hits(client, "host_dram") + hits(client, "nvme_ssd")
    assert fill(client, 8300 + level, 2) == cold
    assert hits(client, "host_dram") + hits(client, "nvme_ssd") == before


def test_an_engine_at_rest_holds_nothing(client: VllmClient) -> None:
    wait_idle(client)
    client.complete(prompt(8400, chunks=1), max_tokens=1)
    wait_until(lambda: client.metric("dynamo_kvbm_pinned_blocks") == 0 or _step(client), "no block is pinned")


def _step(client: VllmClient) -> bool:
    """Gauges are published by steps."""
    client.complete(prompt(8500, chunks=1), max_tokens=1)
    return False
