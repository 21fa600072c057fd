"""Prefill and decode apart: which prompts go to a prefill engine first, what both halves are sent, and what happens
when either of them fails.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import orjson
import pytest
from aiohttp import web
from dynamo_proxy import handoff
from dynamo_proxy.config import EngineAddress, EngineOptions, Routing, parse_engine_url
from dynamo_proxy.errors import ConfigError
from dynamo_proxy.policy import CostModel, Load, is_sooner_elsewhere
from dynamo_proxy.server import ProxyServer

from tests.proxy.proxy_fakes import QUICK, Answer, Client, ask, chat, get, post, proxy_before, run, wait_until
from tests.proxy.test_proxy_resume import text_of
from tests.proxy.token_engine import TokenEngine, chat_ids, expected_text

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = "a long prompt " * 200
TICKET = {
    "do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": "e1", "remote_request_id": "r1",
    "remote_block_ids": [[1, 2, 3]], "remote_host": "10.0.0.7", "remote_port": 5600, "tp_size": 1, "dynamo_lease": "x",
}  # fmt: skip
SMALL = Routing(prefill_min_tokens=100)


class Half(TokenEngine):
    """An engine of a role. As a prefill engine it answers with a ticket, or as `how_prefill` says."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role
        self.how_prefill = "ticket"
        self.release = asyncio.Event()

    @property
    def address(self) -> EngineAddress:
        return EngineAddress("127.0.0.1", self.port, EngineOptions(role=self.role))

    @property
    def params(self) -> list[Any]:
        return [prompt.get("kv_transfer_params") for prompt in self.prompts]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        asked = orjson.loads(await request.read())
        if not (asked.get("kv_transfer_params") or {}).get("do_remote_decode"):
            return await super()._answer(request)
        self.requests.append((request.path, dict(request.headers), await request.read()))
        if self.how_prefill == "hang":
            self.active += 1
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.aborted += 1
                raise
            finally:
                self.active -= 1
        if self.how_prefill == "die":
            assert request.transport is not None
            request.transport.abort()
        if self.how_prefill.startswith("status"):
            return web.json_response({"error": {"message": "no"}}, status=int(self.how_prefill[7:]))
        if self.how_prefill == "noise":
            return web.Response(text="{")
        return web.json_response({"choices": [], "kv_transfer_params": TICKET if self.how_prefill != "none" else None})


@contextlib.asynccontextmanager
async def one_and_one(**settings: Any) -> AsyncIterator[tuple[ProxyServer, Half, Half]]:
    prefill, decode = Half("prefill"), Half("decode")
    await prefill.start()
    await decode.start()
    settings.setdefault("routing", SMALL)
    async with proxy_before(prefill, decode, **settings) as proxy:
        yield proxy, prefill, decode


def legs(proxy: ProxyServer, reason: str) -> bool:
    return f'router_prefill_legs_total{{reason="{reason}"}} 1.0'.encode() in proxy.front_end.metrics()


def told(answer: Answer) -> tuple[str, str]:
    """Who computed the prompt, and why, as the receipt says."""
    receipt = orjson.loads(answer.headers["x-dynamo-route"])
    return receipt["prefill_engine"], receipt["prefill_reason"]


def right(answer: Answer, text: str, tokens: int) -> bool:
    return text_of(answer) == expected_text(chat_ids([{"content": text}]), tokens)


def test_a_long_prompt_is_computed_by_the_prefill_engine_first() -> None:
    async def body() -> None:
        async with one_and_one() as (proxy, prefill, decode):
            asked = chat(LONG, stream=True, max_tokens=5, max_completion_tokens=5, min_tokens=2, top_p=0.5)
            answer = await ask(proxy.port, post(CHAT, asked, "x-request-id: abc", "x-dynamo-route: 1"))
            assert right(answer, LONG, 5)
            (half,), (rest,) = prefill.prompts, decode.prompts
            assert (half["max_tokens"], half["max_completion_tokens"], half["stream"]) == (1, 1, False)
            assert half["messages"] == rest["messages"]
            assert half["top_p"] == rest["top_p"] == 0.5
            assert "min_tokens" not in half
            assert half["kv_transfer_params"]["do_remote_decode"] is True
            assert rest["kv_transfer_params"] == TICKET
            assert {k: v for k, v in rest.items() if k not in ("kv_transfer_params", "return_token_ids")} == asked
            heads = [engine.requests[0][1].items() for engine in (prefill, decode)]
            assert all(("x-request-id", "abc") in {(name.lower(), value) for name, value in head} for head in heads)
            receipt = orjson.loads(answer.headers["x-dynamo-route"])
            assert (receipt["engine"], receipt["attempts"], told(answer)) == (
                "engine-1",
                1,
                ("engine-0", "handed_over"),
            )
            assert legs(proxy, "handed_over")

    run(body())


@pytest.mark.parametrize(
    ("path", "asked", "reason"),
    [
        (CHAT, chat("short", max_tokens=3), "short"),
        (CHAT, chat(LONG, max_tokens=3, n=2), "not_divisible"),
        (COMPLETIONS, {"model": "tiny", "prompt": LONG, "echo": True}, "not_divisible"),
        (COMPLETIONS, {"model": "tiny", "prompt": [LONG, LONG]}, "not_divisible"),
        ("/v1/embeddings", {"model": "tiny", "input": LONG}, "not_divisible"),
    ],
)
def test_what_is_short_or_cannot_be_halved_goes_to_the_decode_engine_alone(
    path: str, asked: dict[str, Any], reason: str
) -> None:
    async def body() -> None:
        async with one_and_one() as (proxy, prefill, decode):
            answer = await ask(proxy.port, post(path, asked, "x-dynamo-route: 1"))
            assert (answer.status, told(answer)) == (200, ("", reason))
            assert (prefill.prompts, decode.prompts) == ([], [asked])
            assert legs(proxy, reason)

    run(body())


def test_what_a_decode_engine_holds_needs_no_prefill_engine() -> None:
    async def body() -> None:
        async with one_and_one() as (proxy, prefill, decode):
            for _ in range(2):
                answer = await ask(proxy.port, post(CHAT, chat(LONG, stream=True, max_tokens=2)))
                assert right(answer, LONG, 2)
            assert decode.params == [TICKET, None]
            assert len(prefill.prompts) == 1

    run(body())


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("die", "connection_lost"), ("status 500", "status_500"), ("status 400", "status_400"), ("none", "no_ticket"),
        ("noise", "no_ticket"), ("hang", "timeout"), ("stopped", "connect_failed"),
    ],
)  # fmt: skip
def test_a_prefill_engine_that_fails_or_is_late_costs_a_computation(how: str, reason: str) -> None:
    async def body() -> None:
        routing = replace(SMALL, prefill_seconds=0.2 if how == "hang" else 60)
        slow = replace(QUICK, probe_interval_seconds=60)  # a stopped engine is found out by the request
        async with one_and_one(routing=routing, timeouts=slow) as (proxy, prefill, decode):
            prefill.how_prefill = how
            if how == "stopped":
                await prefill.stop()
            answer = await ask(proxy.port, post(CHAT, chat(LONG, stream=True, max_tokens=4)))
            assert right(answer, LONG, 4)
            assert decode.params == [None]
            assert legs(proxy, reason)
            await wait_until(lambda: not prefill.active, "the prefill engine stops")
            assert prefill.aborted == (how == "hang")

    run(body())


def test_a_client_that_leaves_stops_the_prefill_engine_and_no_other_hears_of_it() -> None:
    async def body() -> None:
        async with one_and_one() as (proxy, prefill, decode):
            prefill.how_prefill = "hang"
            async with Client.to(proxy.port) as client:
                client.send(post(CHAT, chat(LONG, stream=True)))
                await wait_until(lambda: prefill.active == 1, "it computes")
            await wait_until(lambda: prefill.aborted == 1, "it is told to stop")
            await wait_until(lambda: proxy.ledger.in_flight == 0, "nothing is in flight")
            assert decode.prompts == []
            assert legs(proxy, "cancelled")

    run(body())


def test_a_client_that_leaves_during_decode_stops_it() -> None:
    async def body() -> None:
        async with one_and_one(resume_streams=False) as (proxy, _, decode):
            decode.break_after, decode.how = 2, "hang"
            async with Client.to(proxy.port) as client:
                client.send(post(CHAT, chat(LONG, stream=True)))
                assert (await client.head()).status == 200
                await wait_until(lambda: decode.hold is not None, "it stands")
                assert proxy.ledger.in_flight == 1  # the prefill engine was let go
            await wait_until(lambda: proxy.ledger.in_flight == 0, "the decode engine is let go")

    run(body())


def test_a_ticket_is_used_once_and_another_decode_engine_gets_its_own() -> None:
    async def body() -> None:
        prefill, first, second = Half("prefill"), Half("decode"), Half("decode")
        for engine in (prefill, first, second):
            await engine.start()
        async with proxy_before(prefill, first, second, routing=SMALL, router_mode="round-robin") as proxy:
            first.status = 503
            answer = await ask(proxy.port, post(CHAT, chat(LONG, stream=True, max_tokens=4)))
            assert right(answer, LONG, 4)
            assert (first.params, second.params) == ([TICKET], [TICKET])
            assert len(prefill.prompts) == 2
            first.status = 200
            answer = await ask(proxy.port, post(CHAT, chat(LONG + "!", stream=True, max_tokens=4)))
            assert right(answer, LONG + "!", 4)

    run(body())


def test_a_stream_that_breaks_after_the_hand_over_goes_on_elsewhere() -> None:
    async def body() -> None:
        prefill, first, second = Half("prefill"), Half("decode"), Half("decode")
        for engine in (prefill, first, second):
            await engine.start()
        first.break_after = 4
        async with proxy_before(prefill, first, second, routing=SMALL, router_mode="round-robin") as proxy:
            answer = await ask(proxy.port, post(CHAT, chat(LONG, stream=True, max_tokens=12)))
            assert right(answer, LONG, 12)
            assert second.params == [None]

    run(body())


def test_hints_of_the_client_stay_and_its_tickets_do_not() -> None:
    async def body() -> None:
        async with one_and_one() as (proxy, prefill, decode):
            hints = {"do_remote_prefill": True, "remote_host": "evil", "dynamo_prefetch": True}
            await ask(proxy.port, post(CHAT, chat(LONG, stream=True, max_tokens=2, kv_transfer_params=hints)))
            assert prefill.params[0]["dynamo_prefetch"] is True
            assert prefill.params[0]["remote_host"] is None
            assert decode.params == [{"dynamo_prefetch": True, **TICKET}]

    run(body())


def test_prefill_engines_answer_nobody_and_engines_without_a_role_hand_nothing_over() -> None:
    async def body() -> None:
        prefill, plain = Half("prefill"), Half("")
        await prefill.start()
        await plain.start()
        async with proxy_before(prefill, plain, routing=SMALL) as proxy:
            for number in range(4):
                await ask(proxy.port, post(CHAT, chat(f"{number}" + LONG, stream=True, max_tokens=2)))
            assert (len(prefill.prompts), plain.params) == (0, [None] * 4)
            proxy.registry.find(plain.address).draining = True
            assert (await ask(proxy.port, post(CHAT, chat()))).status == 503
            assert (await ask(proxy.port, get("/health"))).status == 503

    run(body())


def test_a_prefill_engine_with_a_long_queue_is_not_asked() -> None:
    async def body(limit: int, reason: str) -> None:
        routing = replace(SMALL, prefill_max_queued_tokens=limit)
        async with one_and_one(routing=routing) as (proxy, prefill, decode):
            prefill.how_prefill = "hang"
            async with Client.to(proxy.port) as client:
                client.send(post(CHAT, chat("first " + LONG, stream=True, max_tokens=2)))
                await wait_until(lambda: prefill.active == 1, "it computes")
                second = post(CHAT, chat("second " + LONG, stream=True, max_tokens=2), "x-dynamo-route: 1")
                answer = await ask(proxy.port, second)
                assert right(answer, "second " + LONG, 2)
                assert (legs(proxy, reason), told(answer)) == (True, ("", reason))
                prefill.how_prefill = "ticket"
                prefill.release.set()
                assert right(await client.answer(), "first " + LONG, 2)
                assert decode.params == [None, TICKET]

    run(body(10, "queue_full"))
    run(body(-1, "later"))  # the decode engine would be done sooner


def test_the_receipt_says_when_no_prefill_engine_is_there_or_trusted() -> None:
    async def body() -> None:
        async with one_and_one() as (proxy, prefill, _):
            engine = proxy.registry.find(prefill.address)
            first, second = [post(CHAT, chat(f"{n}" + LONG, max_tokens=2), "x-dynamo-route: 1") for n in range(2)]
            while not engine.breaker.blocks:
                engine.breaker.failed(asyncio.get_running_loop().time())
            assert told(await ask(proxy.port, first)) == ("", "tripped")
            engine.draining = True
            assert told(await ask(proxy.port, second)) == ("", "no_engine")

    run(body())


def test_the_learnt_prices_say_who_computes() -> None:
    model = CostModel(t_p=1e-4, alpha=0.3)
    idle, busy = Load(0), Load(1, in_flight=4, pending_tokens=20_000)
    assert is_sooner_elsewhere(busy, 1000, idle, 1000, 1000, model)
    assert not is_sooner_elsewhere(idle, 1000, busy, 1000, 1000, model)
    assert not is_sooner_elsewhere(idle, 1000, idle, 2000, 2000, model)
    assert is_sooner_elsewhere(idle, 1000, idle, 1000, 1000, model)


def test_a_decode_engine_is_chosen_by_what_it_must_do_itself() -> None:
    async def body() -> None:
        prefill, first, second = Half("prefill"), Half("decode"), Half("decode")
        for engine in (prefill, first, second):
            await engine.start()
        async with proxy_before(prefill, first, second, routing=SMALL) as proxy:
            at = {engine.port: proxy.registry.find(engine.address).slot for engine in (first, second)}
            leases = [proxy.ledger.charge(at[first.port], 0, 200_000) for _ in range(20)]
            await ask(proxy.port, post(CHAT, chat(LONG, stream=True, max_tokens=2)))
            assert (first.params, second.params) == ([], [TICKET])
            for lease in leases:
                proxy.ledger.release(lease)

    run(body())


def test_roles_are_parsed_and_mistakes_told() -> None:
    assert parse_engine_url("http://a:1,role=prefill,idle=3").options == EngineOptions(role="prefill", idle_seconds=3)
    with pytest.raises(ConfigError, match=r"role=prefill\|decode\|both"):
        parse_engine_url("http://a:1,role=encode")


def test_the_pure_halves() -> None:
    assert handoff.ticket(b"not json") is None
    assert handoff.ticket(b"[1]") is None
    assert handoff.ticket(orjson.dumps({"kv_transfer_params": {"do_remote_prefill": False}})) is None
    assert handoff.prefill_body("/v1/embeddings", b"{}") is None
    spaced = b' {"prompt": "kv_transfer_params is a word", "big": 123456789012345678901}'
    assert orjson.loads(handoff.with_params(b' {"a": 1}', TICKET)) == {"a": 1, "kv_transfer_params": TICKET}
    assert orjson.loads(handoff.with_params(spaced, TICKET))["kv_transfer_params"] == TICKET
