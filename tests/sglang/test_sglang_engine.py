"""The dynamo storage backend under a real SGLang: the same answers as without it, from the disk."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.sglang.conftest import write_tiny_model
from tests.sglang.server import Answer, Server, prompts
from tools.server_process import SHARED_MEMORY, members_of

# Booting takes 35 s on a quiet machine of 2 cores and minutes on a busy one.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

_FLOOD = 6
_ATTEMPTS = 5


def flood(server: Server, seed: int) -> None:
    """Other prompts, enough of them to push everything else out of both of SGLang's own levels."""
    for prompt in prompts(seed, _FLOOD):
        server.generate(prompt)


def answer_from_storage(server: Server, prompt: list[int], expected: list[int]) -> Answer:
    """Asks until the disk had part in the answer. SGLang writes in the background and may drop a first write."""
    for attempt in range(_ATTEMPTS):
        flood(server, seed=1000 + attempt)
        answer = server.generate(prompt)
        assert answer.output == expected
        if answer.storage_tokens:
            return answer
        time.sleep(1)
    pytest.fail(f"no answer came from the disk in {_ATTEMPTS} attempts")


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
    """Last in this file: the session's server is gone afterwards."""
    assert server.process.process is not None
    session = server.process.process.pid
    slab = server.slab()
    server.process.stop()
    assert not slab.exists()
    assert not members_of(session)
    assert not [path for path in SHARED_MEMORY.iterdir() if "dynamo" in path.name or "kvbm" in path.name]
    assert "nvme_ssd tier closed" in server.process.log.read_text()


def corrupt_every_slot(slab: Path, step_bytes: int = 4096) -> None:
    """One byte in every 4 KiB, headers included, through another descriptor: what failing flash does."""
    with slab.open("r+b") as file:
        for offset in range(2000, slab.stat().st_size, step_bytes):
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ 0x40]))
