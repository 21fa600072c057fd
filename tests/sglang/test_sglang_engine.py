"""The dynamo storage backend under a real SGLang: the same answers as without it, from the disk."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import requests
import zmq
from dynamo_proxy.block_hash import block_hash, root_hash
from dynamo_proxy.kv_events import decode_batch
from dynamo_proxy.kv_index import MEDIUM_BITS, KvIndex

from tests.sglang.asking import answer_from_storage, flood
from tests.sglang.server import Answer, Server, prompts
from tests.sglang.tiny_model import write_tiny_model
from tools.server_process import SHARED_MEMORY, members_of
from tools.sglang_server import PAGE_TOKENS

# Booting takes 35 s on a quiet machine of 2 cores and minutes on a busy one.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def test_warm_answers_equal_cold_ones_and_come_from_the_disk(server: Server) -> None:
    mine = prompts(seed=1, count=4)
    cold = [server.generate(prompt) for prompt in mine]
    assert [answer.cached_tokens for answer in cold] == [0] * len(mine)
    assert len({tuple(answer.output) for answer in cold}) == len(mine), "the model's answers do not tell prompts apart"
    hits = server.metric("dynamo_kvbm_hit_blocks_total", 'tier="nvme_ssd"')
    for prompt, first in zip(mine, cold, strict=True):
        assert answer_from_storage(server, prompt, first.output).storage_tokens >= 256
    assert server.metric("dynamo_kvbm_hit_blocks_total", 'tier="nvme_ssd"') >= hits + 4 * 16
    assert server.metric("dynamo_kvbm_offloaded_blocks_total", 'tier="nvme_ssd"') > 0
    assert server.metric("dynamo_kvbm_memory_utilization_percent", 'tier="nvme_ssd"') > 0
    assert server.metric("dynamo_kvbm_wanted_blocks_total") >= server.metric("dynamo_kvbm_hit_blocks_total")
    for what in ("onboard", "offload"):
        assert server.metric(f"dynamo_kvbm_{what}ed_bytes_total", 'tier="nvme_ssd"') > 0
        assert server.metric("dynamo_kvbm_transfer_seconds_count", f'what="{what}"') > 0
    assert server.metric("sglang:prefetched_tokens_total") > 0
    assert server.metric("sglang:prefetch_pgs_sum") > 0


def test_a_shared_beginning_is_reused_and_the_rest_computed(server: Server) -> None:
    first, other = prompts(seed=2, count=2)
    cold = server.generate(first)
    answer_from_storage(server, first, cold.output)
    mixed = first[:288] + other[:64]
    flood(server, seed=21)
    warm = server.generate(mixed)
    server.post("/flush_cache")
    server.post("/hicache/storage-backend/clear")
    assert server.generate(mixed).output == warm.output


def test_another_salt_never_sees_our_pages(server: Server) -> None:
    (prompt,) = prompts(seed=3, count=1)
    cold = server.generate(prompt)
    answer_from_storage(server, prompt, cold.output)
    flood(server, seed=31)
    salted = server.generate(prompt, extra_key="another tenant")
    assert salted.storage_tokens == 0
    assert salted.output == cold.output


def test_damage_on_the_live_disk_is_counted_and_never_answered_with(server: Server) -> None:
    (prompt,) = prompts(seed=4, count=1)
    cold = server.generate(prompt)
    answer_from_storage(server, prompt, cold.output)
    flood(server, seed=41)
    failures = server.metric("dynamo_kvbm_load_failures_total")
    corrupt_every_slot(server.slab())
    again = server.generate(prompt)
    assert again.output == cold.output
    assert again.storage_tokens == 0
    assert server.metric("dynamo_kvbm_load_failures_total") > failures
    assert server.metric("dynamo_kvbm_dropped_blocks_total", 'reason="damaged"') > 0
    # Computed again, written again: the disk is of use again.
    answer_from_storage(server, prompt, cold.output)


def test_routers_hear_of_the_disk_by_our_own_decoder(server: Server) -> None:
    (prompt,) = prompts(seed=6, count=1)
    cold = server.generate(prompt)
    answer_from_storage(server, prompt, cold.output)
    chain, parent = [], root_hash("", "")
    for start in range(0, len(prompt), PAGE_TOKENS):
        parent = block_hash(parent, tuple(prompt[start : start + PAGE_TOKENS]), b"")
        chain.append(parent)
    for _ in range(20):
        index = replayed_index(server)
        if all(index.media(0, node) & MEDIUM_BITS["DISK"] for node in chain):
            return
        server.generate(prompts(seed=61, count=1)[0])  # SGLang publishes as it works
    pytest.fail("the prompt's pages were never announced as lying on the disk")


def test_aborted_requests_leave_nothing_behind(server: Server) -> None:
    mine = prompts(seed=7, count=6)
    cold = [server.generate(prompt) for prompt in mine]
    flood(server, seed=71)

    def ask(prompt: list[int]) -> None:
        with suppress(requests.RequestException, AssertionError, KeyError):  # an aborted one has no such answer
            server.generate(prompt)

    for pause_seconds in (0.0, 0.05, 0.3):  # during the prefetch, the prefill and the backup
        askers = [threading.Thread(target=ask, args=(prompt,)) for prompt in mine]
        for asker in askers:
            asker.start()
        time.sleep(pause_seconds)
        server.post("/abort_request", {"abort_all": True})
        for asker in askers:
            asker.join()
    for prompt, first in zip(mine, cold, strict=True):
        assert server.generate(prompt).output == first.output
    answer_from_storage(server, mine[0], cold[0].output)


def test_detached_and_attached_again_the_tier_is_warm(server: Server) -> None:
    (prompt,) = prompts(seed=8, count=1)
    cold = server.generate(prompt)
    answer_from_storage(server, prompt, cold.output)
    backend = "/hicache/storage-backend"
    for _ in range(2):
        server.call("DELETE", backend)
    assert server.log().count("nvme_ssd tier closed") == server.log().count("nvme_ssd tier /")
    server.post("/flush_cache")
    without = server.generate(prompt)
    assert (without.output, without.storage_tokens) == (cold.output, 0)
    server.post("/flush_cache")
    attach = {"hicache_storage_backend": "dynamo", "hicache_storage_prefetch_policy": "wait_complete"}
    extra = "hicache_storage_backend_extra_config_json"
    refused = server.call("PUT", backend, {**attach, extra: '{"kvbm_nvme_gb": 0.05}'}, expect=400)
    assert "needs --kvbm-nvme-path DIR" in refused
    settings = f'{{"kvbm_nvme_path": "{server.nvme}", "kvbm_nvme_gb": 0.05}}'
    for _ in range(2):
        server.call("PUT", backend, {**attach, extra: settings})
    warm = server.generate(prompt)
    assert warm.output == cold.output
    assert warm.storage_tokens >= 256, "the slab was not found again"


@pytest.fixture(scope="module")
def killed_and_restarted(server: Server) -> list[tuple[list[int], Answer]]:
    """SIGKILL to the whole server while it works, and a new one on its slab. What was asked before, and the answers."""
    mine = prompts(seed=9, count=4)
    cold = [server.generate(prompt) for prompt in mine]
    for prompt, first in zip(mine, cold, strict=True):
        answer_from_storage(server, prompt, first.output)

    def keep_asking() -> None:
        with suppress(requests.RequestException, AssertionError, KeyError):
            for prompt in prompts(seed=91, count=500):
                server.generate(prompt)

    askers = [threading.Thread(target=keep_asking) for _ in range(3)]
    for asker in askers:
        asker.start()
    time.sleep(1.5)
    assert server.process.process is not None
    for pid in members_of(server.process.process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    server.process.process.wait()
    for asker in askers:
        asker.join()
    server.process.start().wait_ready()
    return list(zip(mine, cold, strict=True))


def test_killed_under_load_and_restarted_it_answers_from_the_disk(
    server: Server, killed_and_restarted: list[tuple[list[int], Answer]]
) -> None:
    assert "blocks of an earlier engine found again" in server.log()
    for prompt, first in killed_and_restarted:
        warm = server.generate(prompt)
        assert warm.output == first.output
        assert warm.storage_tokens >= 256
    assert server.metric("dynamo_kvbm_load_failures_total") == 0


def test_new_weights_never_meet_old_pages(server: Server, tmp_path: Path) -> None:
    (prompt,) = prompts(seed=5, count=1)
    old = server.generate(prompt)
    answer_from_storage(server, prompt, old.output)
    flood(server, seed=51)
    other = write_tiny_model(tmp_path / "other", seed=8)
    for weights in (other, server.model):
        result = server.post("/update_weights_from_disk", {"model_path": str(weights)})
        assert result["success"], result
        first = server.generate(prompt)
        assert first.storage_tokens == 0
        assert (first.output == old.output) is (weights == server.model)
        answer_from_storage(server, prompt, first.output)


def test_a_stopped_server_leaves_nothing_behind(server: Server) -> None:
    """Last in this file: the session's server is gone afterwards. Its weights had changed, so its slab goes too."""
    assert server.process.process is not None
    session = server.process.process.pid
    slab = server.slab()
    server.process.stop()
    assert not slab.exists()
    assert not members_of(session)
    assert not [path for path in SHARED_MEMORY.iterdir() if "dynamo" in path.name or "kvbm" in path.name]
    assert "nvme_ssd tier closed" in server.log()


def replayed_index(server: Server) -> KvIndex:
    """Our proxy's index, fed with everything that SGLang has published."""
    index = KvIndex()
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 20_000)
        socket.connect(f"tcp://127.0.0.1:{server.replay_port}")
        socket.send_multipart([b"", (0).to_bytes(8, "big")])
        while True:
            *_, sequence, payload = socket.recv_multipart()
            if sequence == b"\xff" * 8:
                return index
            for event in decode_batch(payload)[0]:
                index.apply(0, 0, event)


def corrupt_every_slot(slab: Path, step_bytes: int = 4096) -> None:
    """One byte in every 4 KiB, headers included, through another descriptor: what failing flash does."""
    with slab.open("r+b") as file:
        for offset in range(2000, slab.stat().st_size, step_bytes):
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ 0x40]))
