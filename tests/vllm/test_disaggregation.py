"""A real prefill and a real decode vLLM, by the engine's own protocol and behind dynamo-proxy: answers equal those
of one engine alone.

The last tests kill the prefill engine and start it again at the same address.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("vllm")

from dynamo_proxy.config import Routing
from dynamo_proxy.server import ProxyServer
from dynamo_proxy.text_chain import read_prompt

from tests.proxy.proxy_fakes import proxy_before, run
from tests.proxy.proxy_fakes import wait_until as wait
from tests.vllm.client import Answer, VllmClient, prompt, wait_until
from tests.vllm.pair import BLOCKS, Pair
from tests.vllm.proxied import PATIENT, Standing, aside
from tools.vllm_server import BLOCK_TOKENS, MODEL_NAME

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

PROMPTS = 5
TELL = {"kvbm_tell_peer": True}


class Handed(NamedTuple):
    """A prompt, its answer from one engine alone, and the ticket that the prefill engine gave for it."""

    tokens: list[int]
    alone: Answer
    ticket: dict[str, Any]


@pytest.fixture(scope="module")
def pair(tiny_model: Path, logs: Path) -> Iterator[Pair]:
    pair = Pair(tiny_model, logs, ["--kvbm-peer-deadline-ms", "4000"], "tcp")
    try:
        yield pair.start()
    finally:
        pair.close()


@pytest.fixture(scope="module")
def old(pair: Pair) -> Handed:
    """Given out before all other tests; its lease runs while they do."""
    return hand_out(pair, 900)


def hand_out(pair: Pair, seed: int) -> Handed:
    tokens = prompt(seed)
    return Handed(tokens, pair.prefill.complete(tokens), pair.ticket(tokens))


def answer(pair: Pair, handed: Handed, **changes: Any) -> Answer:
    return pair.decode.complete(handed.tokens, kv_transfer_params={**handed.ticket, **changes})


def hand_over(pair: Pair, seed: int) -> None:
    """Eventually, however slow the machine, prompts come from the peer, and always with the same answer."""
    seeds = iter(range(seed, seed + 100))

    def comes_from_peer() -> bool:
        before, handed = pair.from_peer(), hand_out(pair, next(seeds))
        assert answer(pair, handed) == handed.alone
        return pair.from_peer() == before + BLOCKS

    wait_until(comes_from_peer, "a prompt comes from the peer", 120.0)


@contextmanager
def stopped(pair: Pair) -> Iterator[None]:
    """Every process of the prefill engine stands still."""
    pair.prefill_server.stand_still()
    try:
        yield
    finally:
        pair.prefill_server.go_on()


def hint(pair: Pair, tokens: list[int]) -> tuple[Answer, dict[str, Any]]:
    """An ordinary request to the other engine, its answer, and what a proxy may say of its prompt from then on."""
    body = {"model": MODEL_NAME, "prompt": prompt(899, 1), "max_tokens": 1, "kv_transfer_params": TELL}
    name = pair.prefill.post("/v1/completions", body)["kv_transfer_params"]["kvbm_peer"]
    return pair.prefill.complete(tokens), {"kvbm_peer": name, "kvbm_peer_tokens": len(tokens)}


def fetch(pair: Pair, seed: int) -> None:
    """Eventually, however slow the machine, a prefix comes from the engine that is named as its holder."""
    seeds = iter(range(seed, seed + 80))

    def is_fetched() -> bool:
        tokens, before = prompt(next(seeds)), pair.from_peer()
        alone, params = hint(pair, tokens)
        assert pair.decode.complete(tokens, kv_transfer_params=params) == alone
        return pair.from_peer() == before + BLOCKS

    wait_until(is_fetched, "a prefix comes from its holder", 120.0)


def failures(pair: Pair) -> float:
    return pair.decode.metric("dynamo_kvbm_load_failures_total")


def test_dynamo_proxy_names_the_holder_of_a_prefix_to_the_engine_that_gets_the_prompt(pair: Pair, old: Handed) -> None:
    seeds = count(30_000)

    async def body() -> None:
        holder, reader = Standing(pair.prefill.url), Standing(pair.decode.url)
        async with proxy_before(holder, reader, timeouts=PATIENT, router_mode="round-robin") as proxy:
            client = VllmClient(f"http://127.0.0.1:{proxy.port}")
            await wait(lambda: all(engine.peer_name is not None for engine in proxy.registry), "names are known", 120.0)
            assert [bool(engine.peer_name) for engine in proxy.registry] == [True, False]
            await wait(lambda: proxy.registry.at(0).knowledge == "exact", "its events are all known", 60.0)

            def is_in_host_memory(tokens: list[int]) -> bool:
                reaches = proxy.knowledge.reaches(read_prompt({"model": MODEL_NAME, "prompt": tokens}), 1)
                return 0 in reaches and reaches[0].host >= BLOCKS * BLOCK_TOKENS

            for seed in seeds:
                tokens, before = prompt(seed), await aside(pair.from_peer)
                alone = await aside(lambda: client.complete(tokens))  # noqa: B023
                await wait(lambda: is_in_host_memory(tokens), "the events tell of its copy", 60.0)  # noqa: B023
                assert await aside(lambda: client.complete(tokens)) == alone  # noqa: B023
                if await aside(pair.from_peer) == before + BLOCKS:
                    break
            else:
                raise AssertionError("no prompt was fetched from the engine that holds it")
            name = "dynamo_router_hints_total"
            assert (proxy.metrics.registry.get_sample_value(name, {"kind": "peer"}) or 0) >= 1

    run(body())


def test_answers_equal_those_of_one_engine_alone(pair: Pair, old: Handed) -> None:
    hand_over(pair, 0)
    handed = [hand_out(pair, seed) for seed in range(100, 100 + PROMPTS)]
    before = pair.from_peer()
    assert [answer(pair, each) for each in handed] == [each.alone for each in handed]
    assert pair.from_peer() > before
    assert pair.decode.metric("dynamo_nixl_read_bytes_total") >= BLOCKS * 65536
    assert pair.decode.metric("dynamo_nixl_window_blocks_total") >= BLOCKS


def test_a_prompt_that_only_another_engine_has_computed_is_fetched(pair: Pair, old: Handed) -> None:
    fetch(pair, 120)
    assert pair.decode.metric("dynamo_nixl_peer_hints_total") >= 1
    tokens = prompt(119)  # the holder has never seen it
    before = failures(pair)
    _, params = hint(pair, prompt(118))
    alone = pair.decode.complete(tokens, kv_transfer_params=params)
    assert failures(pair) == before + BLOCKS
    assert pair.prefill.complete(tokens) == alone


def test_an_engine_that_stands_still_costs_no_answer_and_nobody_else(pair: Pair, old: Handed) -> None:
    handed, before = hand_out(pair, 200), failures(pair)
    held = prompt(203)
    alone_held, params = hint(pair, held)
    others = [(tokens, pair.prefill.complete(tokens)) for tokens in map(prompt, (201, 202))]
    with stopped(pair), ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(answer, pair, handed)
        for tokens, alone in others:
            # A batch rounds differently from a single request, on stock vLLM too; another prompt's KV is far off.
            said = pair.decode.complete(tokens)
            assert said.tokens == alone.tokens or abs(said.logprobs[0] - alone.logprobs[0]) < 0.2
        said = stuck.result()
        assert said.tokens == handed.alone.tokens or abs(said.logprobs[0] - handed.alone.logprobs[0]) < 0.2
        assert pair.decode.complete(held, kv_transfer_params=params) == alone_held
    assert failures(pair) > before + BLOCKS
    hand_over(pair, 210)
    fetch(pair, 700)


def test_a_client_that_leaves_under_a_load_leaves_nothing_behind(pair: Pair, old: Handed) -> None:
    handed = hand_out(pair, 300)
    body = {"model": MODEL_NAME, "prompt": handed.tokens, "max_tokens": 200, "stream": True, "ignore_eos": True}
    text = json.dumps({**body, "kv_transfer_params": handed.ticket}).encode()
    with stopped(pair):
        urllib.request.urlopen(
            urllib.request.Request(pair.decode.url + "/v1/completions", text, {"content-type": "application/json"}),
            timeout=120,
        ).close()
        wait_until(lambda: pair.decode.metric("vllm:num_requests_running") == 0, "the request is gone", 60.0)
    wait_until(lambda: pair.decode.metric("vllm:kv_cache_usage_perc") == 0.0, "its HBM blocks are free", 60.0)
    hand_over(pair, 310)


@pytest.mark.parametrize("changes", [{"dynamo_signature": "00" * 32}, {"remote_host": "192.0.2.1"}])
def test_a_ticket_that_the_fleet_did_not_sign_is_computed(pair: Pair, old: Handed, changes: dict[str, Any]) -> None:
    handed = hand_out(pair, 400 + len(next(iter(changes.values()))))
    refused = pair.decode.metric("dynamo_nixl_refused_messages_total", reason="unsigned_ticket")
    before = pair.from_peer()
    assert answer(pair, handed, **changes) == handed.alone
    assert pair.from_peer() == before
    assert pair.decode.metric("dynamo_nixl_refused_messages_total", reason="unsigned_ticket") == refused + 1


def test_blocks_re_used_after_the_lease_are_computed_anew(pair: Pair, old: Handed) -> None:
    """What stock vLLM answers with another prompt's KV: the ticket is used after its blocks hold other prompts."""
    seeds = iter(range(500, 10_000))

    def is_over() -> bool:
        _step(pair.prefill, next(seeds))
        return pair.prefill.metric("dynamo_nixl_open_leases") == 0

    wait_until(is_over, "every lease has ended", 180.0)
    assert pair.prefill.metric("dynamo_nixl_leases_ended_total", reason="expired") >= 1
    for _ in range(14):  # more than HBM and host memory hold
        pair.prefill.complete(prompt(next(seeds)), max_tokens=1)
    before, gone = pair.from_peer(), failures(pair)
    assert answer(pair, old) == old.alone
    assert failures(pair) >= gone + BLOCKS
    assert pair.from_peer() == before


def test_dynamo_proxy_answers_as_one_engine_alone(pair: Pair, old: Handed) -> None:
    seeds, streams = count(20_000), count(40_000)  # that never end: StopIteration would be lost in the other thread

    async def body() -> None:
        async with before_both(pair) as proxy:
            client = VllmClient(f"http://127.0.0.1:{proxy.port}")

            def goes_over(stream: bool) -> bool:
                tokens, before = prompt(next(streams if stream else seeds)), pair.from_peer()
                if stream:
                    assert streamed(client, tokens) == streamed(pair.prefill, tokens)
                else:
                    assert client.complete(tokens) == pair.prefill.complete(tokens)
                return pair.from_peer() == before + BLOCKS

            # However slow the machine: what takes too long is computed, and its answer is the same.
            for stream in (False, True):
                await aside(lambda: wait_until(lambda: goes_over(stream), "a prompt goes over", 120.0))  # noqa: B023
            assert legs(proxy, "handed_over") >= 2

    run(body())


def test_an_engine_that_is_killed_under_a_prompt_or_after_its_answer_costs_no_answer(pair: Pair, old: Handed) -> None:
    handed, before = hand_out(pair, 600), failures(pair)
    held, tokens = prompt(602), prompt(601)
    alone_held, params = hint(pair, held)
    alone = pair.prefill.complete(tokens)

    async def body() -> None:
        async with before_both(pair) as proxy:
            client = VllmClient(f"http://127.0.0.1:{proxy.port}")
            pair.prefill_server.stand_still()
            told = asyncio.ensure_future(aside(lambda: client.complete(tokens)))
            prefill = proxy.registry.at(0)
            # Placed is not yet connected, and an engine that ends in between counts otherwise.
            await wait(lambda: any(up.sink for up in prefill.pool._open), "the prefill engine has the prompt", 60.0)
            pair.prefill_server.kill()
            assert await told == alone
            assert legs(proxy, "connection_lost") == 1
            assert await aside(lambda: client.complete(tokens)) == alone  # nobody computes prompts any more

    run(body())
    assert answer(pair, handed) == handed.alone
    assert pair.decode.complete(held, kv_transfer_params=params) == alone_held
    assert failures(pair) > before + BLOCKS

    def is_clean() -> bool:
        _step(pair.decode, 603)
        return (
            pair.decode.metric("dynamo_nixl_quarantined_bytes") == pair.decode.metric("dynamo_kvbm_pinned_blocks") == 0
        )

    wait_until(is_clean, "nothing is quarantined or pinned", 60.0)
    assert "Traceback" not in pair.decode_server.log.read_text()


def test_an_engine_that_comes_back_at_the_same_address_is_met_anew(pair: Pair, old: Handed) -> None:
    pair.prefill_server.kill()
    try:
        pair.prefill_server.start().wait_ready(600.0)
        before = pair.from_peer()
        assert answer(pair, old) == old.alone  # a ticket of the run that is gone
        assert pair.from_peer() == before
        hand_over(pair, 700)
    finally:
        pair.prefill_server.kill()  # this run is the test's own


def before_both(pair: Pair) -> AbstractAsyncContextManager[ProxyServer]:
    """The engines are slots 0 and 1."""
    prefill, decode = Standing(f"{pair.prefill.url},role=prefill"), Standing(f"{pair.decode.url},role=decode")
    return proxy_before(prefill, decode, timeouts=PATIENT, routing=Routing(prefill_min_tokens=1))


def legs(proxy: ProxyServer, reason: str) -> float:
    name = "dynamo_router_prefill_legs_total"
    return proxy.metrics.registry.get_sample_value(name, {"reason": reason}) or 0.0


def streamed(client: VllmClient, tokens: list[int]) -> str:
    """The text of the same answer as a stream."""
    body = {
        "model": MODEL_NAME,
        "prompt": tokens,
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    request = urllib.request.Request(
        client.url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as said:
        events = [json.loads(line[6:]) for line in said if line.startswith(b"data: {")]
    return "".join(choice["text"] for event in events for choice in event["choices"])


def _step(client: VllmClient, seed: int) -> None:
    """Gauges are published by steps."""
    client.complete(prompt(seed, chunks=1), max_tokens=1)
