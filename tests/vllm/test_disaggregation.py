"""A real prefill and a real decode vLLM, under the engine's own protocol: answers equal those of one engine alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.vllm.client import prompt, wait_until
from tests.vllm.pair import Pair
from tools.server_process import members_of

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

#: Full blocks of one prompt.
BLOCKS = 28
PROMPTS = 10


@pytest.fixture(scope="module")
def pair(tiny_model: Path, logs: Path) -> Iterator[Pair]:
    pair = Pair(tiny_model, logs, ["--kvbm-peer-deadline-ms", "4000"], "tcp")
    try:
        yield pair.start()
    finally:
        pair.close()


def send(pair: Pair, what: signal.Signals) -> None:
    """To every process of the prefill engine."""
    assert pair.prefill_server.process is not None
    for process in members_of(pair.prefill_server.process.pid):
        os.kill(process, what)


def hand_over(pair: Pair, seed: int) -> None:
    """Eventually, however slow the machine, prompts come from the peer, and always with the same answer."""
    seeds = iter(range(seed, seed + 100))

    def comes_from_peer() -> bool:
        tokens = prompt(next(seeds))
        alone, before = pair.prefill.complete(tokens), pair.from_peer()
        assert pair.complete(tokens) == alone
        return pair.from_peer() == before + BLOCKS

    wait_until(comes_from_peer, "a prompt comes from the peer", 120.0)


def test_answers_equal_those_of_one_engine_alone(pair: Pair) -> None:
    hand_over(pair, 0)
    alone = [pair.prefill.complete(prompt(seed)) for seed in range(100, 100 + PROMPTS)]
    before = pair.from_peer()
    assert [pair.complete(prompt(seed)) for seed in range(100, 100 + PROMPTS)] == alone
    assert pair.from_peer() > before
    assert pair.decode.metric("dynamo_nixl_read_bytes_total") >= BLOCKS * 65536


def test_an_engine_that_stands_still_costs_its_deadline_and_no_answer(pair: Pair) -> None:
    tokens = prompt(200)
    alone, ticket = pair.prefill.complete(tokens), pair.ticket(tokens)
    send(pair, signal.SIGSTOP)
    try:
        assert pair.decode.complete(tokens, kv_transfer_params=ticket) == alone
    finally:
        send(pair, signal.SIGCONT)
    assert pair.decode.metric("dynamo_kvbm_load_failures_total") >= 1
    hand_over(pair, 210)


def test_blocks_re_used_after_the_lease_are_computed_anew(pair: Pair) -> None:
    """What stock vLLM answers with another prompt's KV: the ticket is used after its blocks hold other prompts."""
    tokens = prompt(300)
    alone, ticket = pair.prefill.complete(tokens), pair.ticket(tokens)
    expired = {"reason": "expired"}
    before = pair.prefill.metric("dynamo_nixl_leases_ended_total", **expired)
    seeds = iter(range(310, 10_000))

    def is_over() -> bool:
        pair.prefill.complete(prompt(next(seeds)), max_tokens=1)
        return pair.prefill.metric("dynamo_nixl_leases_ended_total", **expired) > before

    wait_until(is_over, "the lease has expired", 180.0)
    for _ in range(14):  # more than HBM and host memory hold
        pair.prefill.complete(prompt(next(seeds)), max_tokens=1)
    gone = pair.decode.metric("dynamo_kvbm_load_failures_total")
    assert pair.decode.complete(tokens, kv_transfer_params=ticket) == alone
    assert pair.decode.metric("dynamo_kvbm_load_failures_total") >= gone + BLOCKS


def test_an_engine_that_is_killed_and_started_anew_hands_over_again(pair: Pair) -> None:
    tokens = prompt(400)
    alone, ticket = pair.prefill.complete(tokens), pair.ticket(tokens)
    pair.prefill_server.kill()
    assert pair.decode.complete(tokens, kv_transfer_params=ticket) == alone
    pair.start_prefill()
    assert pair.decode.complete(prompt(401), kv_transfer_params=ticket), "another prompt's old ticket"
    hand_over(pair, 410)
