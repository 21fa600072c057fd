"""A real vLLM whose disk fails, hangs, is full, is closed to it or is cut, whose threads end and whose clock jumps.

Each time: the answers of before, a counted reason, nothing held back. After `test_engine`, whose engine it is.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import pytest

from dynamo_connectors.tiers.slab_format import PAGE_BYTES
from tests.vllm.client import Answer, VllmClient, prompt, wait_until
from tools.server_process import ServerProcess

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

BLOCKS_PER_PROMPT = 28
#: More prompts than host memory keeps: the first of them are on the disk alone.
PROMPTS, FIRST_SEED = 15, 9000
#: Every second call fails, so that the disk is not taken for dead.
SOMETIMES, ALWAYS = 2, 1
HANGS = "hang 1"
Order = Callable[[str, str], AbstractContextManager[None]]


@pytest.fixture
def order(fault_folder: Path) -> Order:
    """Makes a call of the system go wrong, in every process of the engine, until the block ends."""

    @contextmanager
    def ordered(call: str, how: str) -> Iterator[None]:
        partial = fault_folder / f"{call}.new"
        partial.write_text(how)
        partial.rename(fault_folder / call)
        try:
            yield
        finally:
            (fault_folder / call).unlink()
            (fault_folder / f"{call}.hung").unlink(missing_ok=True)

    return ordered


def step_until(client: VllmClient, condition: Callable[[], bool], what: str) -> None:
    """Counts are published by steps, and a step is something to compute."""

    def holds() -> bool:
        client.complete([7] * 8, max_tokens=1)
        return condition()

    wait_until(holds, what, 120)


def wait_idle(client: VllmClient) -> None:
    step_until(client, lambda: client.metric("dynamo_kvbm_pinned_blocks") == 0, "no block is pinned")
    wait_until(lambda: client.metric("vllm:kv_cache_usage_perc") == 0.0, "no HBM block is in use", 120)


def failures(client: VllmClient, what: str, reason: str) -> float:
    return client.metric(f"dynamo_kvbm_{what}_failures_total", reason=reason)


@pytest.fixture(scope="module")
def cold(engine: ServerProcess) -> list[Answer]:
    """Answers to `PROMPTS` prompts, whose blocks are on the disk."""
    client, sunk = VllmClient(engine.url), "dynamo_kvbm_offloaded_blocks_total"
    before = client.metric(sunk, tier="nvme_ssd")
    answers = [client.complete(prompt(FIRST_SEED + number)) for number in range(PROMPTS)]
    wanted = before + PROMPTS * BLOCKS_PER_PROMPT
    step_until(client, lambda: client.metric(sunk, tier="nvme_ssd") >= wanted, "all prompts are on the disk")
    wait_idle(client)
    client.empty_hbm()
    return answers


@pytest.mark.parametrize(
    ("seed", "how", "reason"),
    [
        (8600, str(errno.ENOSPC), "write_failed"),
        (8601, str(errno.EACCES), "write_failed"),
        (8602, "exit", "internal_error"),
    ],
    ids=["full", "rights lost", "threads end"],
)
def test_a_disk_that_takes_nothing_costs_what_it_did_not_take(
    client: VllmClient, order: Order, seed: int, how: str, reason: str
) -> None:
    before = failures(client, "move", reason)
    with order("pwritev", f"{how} {SOMETIMES}"):
        answer = client.complete(prompt(seed))
        step_until(client, lambda: failures(client, "move", reason) > before, f"{reason} is counted")
        wait_idle(client)
    client.empty_hbm()
    assert client.complete(prompt(seed)) == answer
    wait_idle(client)


@pytest.mark.parametrize(
    ("number", "how", "reason"),
    [(0, str(errno.EIO), "read_failed"), (1, "exit", "internal_error")],
    ids=["errors", "threads end"],
)
def test_what_a_disk_does_not_give_back_is_computed(
    client: VllmClient, cold: list[Answer], order: Order, number: int, how: str, reason: str
) -> None:
    before = failures(client, "load", reason)
    with order("preadv", f"{how} {SOMETIMES}"):
        assert client.complete(prompt(FIRST_SEED + number)) == cold[number]
    step_until(client, lambda: failures(client, "load", reason) > before, f"{reason} is counted")
    wait_idle(client)


@pytest.mark.parametrize(("number", "seconds"), [(2, -86_400), (3, 86_400)], ids=["back", "ahead"])
def test_a_clock_that_jumps_changes_nothing(
    client: VllmClient, cold: list[Answer], order: Order, number: int, seconds: int
) -> None:
    hits = client.metric("dynamo_kvbm_hit_blocks_total", tier="nvme_ssd")
    with order("clock", str(seconds)):
        answer = client.complete(prompt(FIRST_SEED + number), kv_transfer_params={"kvbm_pin_ttl_seconds": 0.1})
        assert answer == cold[number]
        assert client.metric("dynamo_kvbm_hit_blocks_total", tier="nvme_ssd") - hits == BLOCKS_PER_PROMPT
        wait_idle(client)


def test_a_disk_that_hangs_keeps_those_who_want_it_until_their_deadline_and_nobody_else(
    client: VllmClient, cold: list[Answer], order: Order, fault_folder: Path
) -> None:
    hits = partial(client.metric, "dynamo_kvbm_hit_blocks_total")
    client.empty_hbm()
    from_dram, late = hits(tier="host_dram"), failures(client, "load", "timeout")
    with ThreadPoolExecutor(1) as pool, order("preadv", HANGS), order("pwritev", HANGS):
        waiting = pool.submit(client.complete, prompt(FIRST_SEED + 4))
        wait_until(lambda: (fault_folder / "preadv.hung").exists(), "the disk hangs", 120)
        # One that is computed, and whose blocks the disk does not take, and one that host memory holds.
        client.complete(prompt(8700, chunks=1), max_tokens=1)
        assert client.complete(prompt(FIRST_SEED + PROMPTS - 1)) == cold[-1]
        assert hits(tier="host_dram") - from_dram == BLOCKS_PER_PROMPT
        assert not waiting.done(), "nobody noticed that the disk hangs"
        assert waiting.result(300) == cold[4]
        step_until(client, lambda: failures(client, "load", "timeout") - late == BLOCKS_PER_PROMPT, "it is counted")
        wait_until(lambda: (fault_folder / "pwritev.hung").exists(), "a write hangs", 120)
        wait_until(lambda: client.metric("vllm:kv_cache_usage_perc") == 0.0, "no HBM block is in use", 120)
    # What the disk says now is too late for everybody.
    wait_idle(client)
    from_disk = hits(tier="nvme_ssd")
    assert client.complete(prompt(FIRST_SEED + 5)) == cold[5]
    assert hits(tier="nvme_ssd") - from_disk == BLOCKS_PER_PROMPT
    wait_idle(client)


def test_a_slab_cut_under_its_engine_is_a_miss(client: VllmClient, cold: list[Answer], nvme_directory: Path) -> None:
    (slab,) = nvme_directory.glob("*.slab")
    os.truncate(slab, PAGE_BYTES)
    assert client.complete(prompt(FIRST_SEED + 6)) == cold[6]
    step_until(client, lambda: failures(client, "load", "short_read") > 0, "it is counted")
    wait_idle(client)


def test_a_dead_disk_is_left_alone_and_the_engine_goes_on(
    client: VllmClient, cold: list[Answer], order: Order, engine: ServerProcess
) -> None:
    dead = f"{errno.EIO} {ALWAYS}"
    with order("preadv", dead), order("pwritev", dead):
        again = [client.complete(prompt(FIRST_SEED + number)) for number in range(7, 10)]
        assert again == cold[7:10]
        step_until(client, lambda: failures(client, "move", "tier_off") > 0, "the tier is off")
        wait_idle(client)
        client.empty_hbm()
        hits = client.metric("dynamo_kvbm_hit_blocks_total", tier="host_dram")
        assert client.complete(prompt(FIRST_SEED + 9)) == cold[9]
        assert client.metric("dynamo_kvbm_hit_blocks_total", tier="host_dram") - hits == BLOCKS_PER_PROMPT
        wait_idle(client)
    assert "nvme_ssd tier off" in engine.log.read_text()
