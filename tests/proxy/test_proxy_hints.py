"""Engines that run our connector are told who else holds a prompt, and to bring up early what lies deep. No others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from aiohttp import web
from dynamo_proxy.config import EngineAddress, EngineOptions, Routing
from dynamo_proxy.hints import LEAST_GAIN_TOKENS, Reach, choose_hints
from dynamo_proxy.knowledge import Knowledge
from dynamo_proxy.server import ProxyServer
from dynamo_proxy.text_chain import read_prompt

from tests.proxy.proxy_fakes import QUICK, ask, chat, post, proxy_before, run, wait_until
from tests.proxy.test_proxy_disaggregation import TICKET
from tests.proxy.test_proxy_events import Publisher
from tests.proxy.test_proxy_kv import removed, stored
from tests.proxy.test_proxy_resume import CHAT, COMPLETIONS, text_of
from tests.proxy.token_engine import TokenEngine, expected_text

OURS = "# TYPE dynamo_kvbm_hit_blocks_total counter\n"
TOKENS = list(range(100, 900))
FAR = "10.0.0.7:5700/3fa9"


class Kvbm(TokenEngine):
    """An engine with our connector. `name` is what its peers call it, None: it serves none."""

    def __init__(self, name: str | None = FAR, role: str = "", metrics: str = OURS) -> None:
        super().__init__()
        self.name = name
        self.metrics_text = metrics
        self.asked_names = 0
        self.busy = False  # then it does not tell
        self.options = EngineOptions(role=role)

    @property
    def address(self) -> EngineAddress:
        return EngineAddress("127.0.0.1", self.port, self.options)

    @property
    def params(self) -> list[Any]:
        return [prompt.get("kv_transfer_params") for prompt in self.prompts]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        asked = orjson.loads(await request.read())
        params = asked.get("kv_transfer_params") or {}
        if params.get("do_remote_decode"):
            self.requests.append((request.path, dict(request.headers), await request.read()))
            return web.json_response({"choices": [], "kv_transfer_params": TICKET})
        if params.get("kvbm_tell_peer") is not True:
            return await super()._answer(request)
        self.asked_names += 1
        if self.busy:
            return web.Response(status=503)
        assert asked["max_tokens"] == 1
        told = {"kvbm_peer": self.name} if self.name is not None else None
        return web.json_response({"choices": [], "kv_transfer_params": told})


@contextlib.asynccontextmanager
async def before(*engines: Kvbm, **settings: Any) -> AsyncIterator[ProxyServer]:
    """Round robin: the first request goes to the first engine, the second to the second."""
    for engine in engines:
        await engine.start()
    async with proxy_before(*engines, router_mode="round-robin", **settings) as proxy:
        ours = [engine for engine in proxy.registry if engine.runs_connector]
        if not any(engine.busy for engine in engines):
            await wait_until(lambda: all(engine.peer_name is not None for engine in ours), "every name is known")
        yield proxy


def completion(**fields: Any) -> bytes:
    return post(COMPLETIONS, {"model": "tiny", "prompt": TOKENS, "max_tokens": 3, **fields})


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [True, False])
def test_who_gets_a_prompt_that_another_engine_has_is_told_its_name(path: str, stream: bool) -> None:
    text = "a prompt that two engines get " * 100
    asked = chat(text) if path == CHAT else {"model": "tiny", "prompt": text}
    asked |= {"max_tokens": 3, "stream": stream, "kv_transfer_params": {"kvbm_no_store": True}}

    async def body() -> None:
        first, second = Kvbm(FAR), Kvbm("10.0.0.8:5700/77")
        async with before(first, second) as proxy:
            for _ in range(2):
                answer = await ask(proxy.port, post(path, asked))
                assert answer.status == 200
            if stream:
                assert text_of(answer) == expected_text([ord(letter) for letter in text], 3)
            assert b'dynamo_router_hints_total{kind="peer"} 1.0' in proxy.front_end.metrics()
        assert first.params == [{"kvbm_no_store": True}]
        (params,) = second.params
        assert params.pop("kvbm_peer_tokens") >= LEAST_GAIN_TOKENS
        assert params == {"kvbm_no_store": True, "kvbm_peer": FAR}
        assert second.prompts[0].keys() - {"return_token_ids"} == asked.keys()

    run(body())


def test_a_stock_engine_is_told_nothing_and_asked_nothing() -> None:
    async def body() -> None:
        ours, stock = Kvbm(), Kvbm(metrics="# TYPE vllm:num_requests_running gauge\n")
        async with before(ours, stock) as proxy:
            for _ in range(3):
                assert (await ask(proxy.port, completion())).status == 200
        assert (ours.asked_names, stock.asked_names) == (1, 0)
        assert ours.params == [None, None]
        assert stock.params == [None]
        assert stock.prompts == [{"model": "tiny", "prompt": TOKENS, "max_tokens": 3}]

    run(body())


def test_an_engine_that_serves_no_peers_is_named_to_nobody_and_asked_once() -> None:
    async def body() -> None:
        reads, also = Kvbm(None), Kvbm(None)
        async with before(reads, also) as proxy:
            for _ in range(2):
                await ask(proxy.port, completion())
            await asyncio.sleep(10 * QUICK.probe_interval_seconds)
        assert (reads.asked_names, also.asked_names) == (1, 1)
        assert also.params == [None]

    run(body())


def test_an_engine_too_busy_to_tell_its_name_is_asked_again_and_one_that_came_back_as_well() -> None:
    async def body() -> None:
        engine = Kvbm()
        engine.busy = True
        async with before(engine) as proxy:
            known = proxy.registry.at(0)
            await wait_until(lambda: engine.asked_names >= 2, "asked again")
            assert known.peer_name is None
            engine.busy = False
            await wait_until(lambda: known.peer_name == FAR, "its name is known")
            port, engine.name = engine.port, "10.0.0.9:5700/88"
            await engine.stop()
            await wait_until(lambda: not known.takes_requests, "it is gone")
            await engine.start(port)
            await wait_until(lambda: known.peer_name == engine.name, "its new name is known", 60)

    run(body())


def test_who_does_not_answer_health_probes_is_named_to_nobody_and_who_drains_is() -> None:
    async def body() -> None:
        holder, other = Kvbm(), Kvbm(None)
        async with before(holder, other) as proxy:
            await ask(proxy.port, completion())
            proxy.registry.at(0).draining = True
            await ask(proxy.port, completion())
            assert other.params[0]["kvbm_peer"] == FAR
            holder.healthy = False
            await wait_until(lambda: proxy.registry.at(0).state == "draining" and not is_ready(proxy), "it is down")
            await ask(proxy.port, completion(prompt=TOKENS[::-1]))
        assert other.params[1] is None

    def is_ready(proxy: ProxyServer) -> bool:
        return proxy.registry.at(0).health.value == "ready"

    run(body())


def test_clients_name_no_peers_and_learn_no_names() -> None:
    async def body() -> None:
        engine = Kvbm()
        async with before(engine) as proxy:
            names = {"kvbm_peer": "10.9.9.9:1/00", "kvbm_peer_tokens": 4096, "kvbm_tell_peer": True}
            answer = await ask(proxy.port, completion(kv_transfer_params={**names, "kvbm_prefetch": True}))
            assert FAR.encode() not in answer.body
        assert engine.asked_names == 1
        assert engine.params == [{"kvbm_prefetch": True}]

    run(body())


def test_a_prefill_engine_is_told_too_and_a_ticket_goes_before_a_hint() -> None:
    async def body() -> None:
        holder, prefill, decode = Kvbm(FAR), Kvbm("10.0.0.8:5700/77", "prefill"), Kvbm("10.0.0.9:5700/88", "decode")
        async with before(holder, prefill, decode, routing=Routing(prefill_min_tokens=100)) as proxy:
            await ask(proxy.port, completion())
            proxy.registry.at(0).draining = True
            await ask(proxy.port, completion())
        (half,) = [params for params in prefill.params if params]
        assert (half["kvbm_peer"], half["do_remote_decode"]) == (FAR, True)
        (whole,) = decode.params
        assert "kvbm_peer" not in whole
        assert whole["dynamo_lease"] == "x"

    run(body())


def test_events_of_host_memory_say_what_a_peer_can_read() -> None:
    async def body() -> None:
        publisher = Publisher()
        blocks = {"type": "BlockStored", "block_hashes": [*range(200)], "parent_block_hash": None}
        blocks |= {"token_ids": TOKENS, "block_size": 4, "medium": "GPU", "lora_name": None, "lora_id": None}
        holder, other = Kvbm(), Kvbm(None)
        holder.event_sources = publisher.vllm_sources

        async def serve() -> None:
            while True:
                publisher.serve_replay()
                await asyncio.sleep(0.005)

        serving = asyncio.get_running_loop().create_task(serve())
        try:
            async with before(holder, other) as proxy:
                await publisher.joined()
                publisher.publish(blocks)
                proxy.registry.at(0).draining = True
                await wait_until(lambda: proxy.knowledge.exact.held_blocks(0) == 200, "its blocks are known")
                await ask(proxy.port, completion())
                publisher.publish({**blocks, "block_hashes": [*range(150)], "token_ids": TOKENS[:600], "medium": "CPU"})
                await wait_until(lambda: proxy.knowledge.reaches(prompt(), 1)[0].host == 600, "copies are known")
                proxy.knowledge.forget(1)
                await ask(proxy.port, completion())
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
        finally:
            serving.cancel()
            publisher.close()
        # HBM alone is no use to others.
        assert other.params == [None, {"kvbm_peer": FAR, "kvbm_peer_tokens": 600}]

    run(body())


def prompt(tokens: list[int] = TOKENS) -> Any:
    return read_prompt({"model": "tiny", "prompt": tokens})


def test_a_prompt_is_followed_through_the_tiers() -> None:
    knowledge = Knowledge()
    knowledge.event_mask = knowledge.exact_mask = 0b011
    knowledge.exact.apply(0, 0, stored([*range(1, 9)], None, TOKENS[:32], size=4))
    assert knowledge.reaches(prompt(), 0b111) == {0: Reach(32, 32, 0)}
    assert knowledge.tiers(prompt(), 0) == {"hbm": 32}
    assert knowledge.tiers(prompt(), 1) == {}
    knowledge.exact.apply(0, 0, stored([*range(1, 9)], None, TOKENS[:32], size=4, medium="STORAGE"))
    knowledge.exact.apply(0, 0, stored([*range(1, 4)], None, TOKENS[:12], size=4, medium="CPU"))
    knowledge.exact.apply(0, 0, removed([*range(1, 9)]))
    assert knowledge.reaches(prompt(), 0b111) == {0: Reach(32, 12, 12)}
    assert knowledge.tiers(prompt(), 0) == {"host": 12, "disk": 20}
    knowledge.sent(2, prompt(), 0.0)  # no events: what was sent there is there
    assert knowledge.reaches(prompt(), 0b111)[2] == Reach(768, 768, 768)
    assert knowledge.tiers(prompt(), 2) == {"hbm": 768}
    knowledge.check()


def test_hints_are_chosen_by_what_each_engine_holds() -> None:
    names = {1: "one", 2: "two", 3: "three"}
    reaches = {0: Reach(100, 100, 100), 1: Reach(900, 900, 300), 2: Reach(800, 800, 800)}
    assert choose_hints(0, reaches, names, True) == {"kvbm_peer": "two", "kvbm_peer_tokens": 800}
    assert choose_hints(2, reaches, names, True) == {}
    assert choose_hints(0, {**reaches, 0: Reach(600, 100, 100)}, names, True) == {"kvbm_prefetch": True}
    assert choose_hints(0, {**reaches, 0: Reach(600, 100, 100)}, names, False) == {}
    assert choose_hints(0, {0: Reach(0, 0, 0)}, names, False) == {}
    assert choose_hints(0, reaches, {}, False) == {}
