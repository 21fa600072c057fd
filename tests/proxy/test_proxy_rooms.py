"""SGLang's prefill and decode engines: both halves of a request meet in a room of the proxy's, and fail as one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import orjson
import pytest
from aiohttp import web
from dynamo_proxy import dialects, handoff
from dynamo_proxy.config import EngineAddress, EngineOptions, Routing
from dynamo_proxy.server import ProxyServer

from tests.proxy.proxy_fakes import QUICK, Client, ask, chat, post, proxy_before, run, wait_until
from tests.proxy.test_proxy_resume import CHAT, COMPLETIONS, events_of, text_of
from tests.proxy.token_engine import SglangEngine, expected_text

GENERATE = "/generate"
ROOM = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
TEXT = "both halves of this"
RIGHT = expected_text([ord(letter) for letter in TEXT], 5)


class Half(SglangEngine):
    """One half. A decode engine answers when a prefill engine of the fleet has been asked for its room."""

    rooms: dict[int, asyncio.Event]

    def __init__(self, role: str, rooms: dict[int, asyncio.Event]) -> None:
        super().__init__()
        self.role, self.rooms = role, rooms
        self.how_half = "well"
        self.bad_halves = 1 << 30  # so many halves of a prefill engine go as `how_half` says
        self.in_chunks, self.wait_seconds = False, 0.0
        self.deaf = False  # a decode engine takes nothing: its other half waits for it
        self.bad_answers = 0  # so many answers of a decode engine are 500
        self.server_info = {"disaggregation_mode": role, "disaggregation_bootstrap_port": 8998}

    @property
    def address(self) -> EngineAddress:
        return EngineAddress("127.0.0.1", self.port, EngineOptions(role=self.role))

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/detokenize":
            return await super()._answer(request)
        asked = orjson.loads(await request.read())
        room, how = asked.get("bootstrap_room"), self.how_half if self.bad_halves > 0 else "well"
        self.bad_halves -= 1
        if type(room) is not int or how.startswith("status"):
            self.requests.append((request.path, dict(request.headers), await request.read()))
            answer = web.json_response({"error": {"message": "no room"}}, status=int(how[7:] or 400))
            if self.in_chunks:
                answer.enable_chunked_encoding()
            return answer
        met = self.rooms.setdefault(room, asyncio.Event())
        if self.role == "decode" and self.deaf:
            await asyncio.Event().wait()
        if self.role == "decode":
            if self.bad_answers:
                self.bad_answers -= 1
                return web.json_response({"error": {"message": "the other half is lost"}}, status=500)
            self.active += 1
            try:
                await met.wait()
            except asyncio.CancelledError:
                self.aborted += 1
                raise
            finally:
                self.active -= 1
            self.rooms.setdefault(-room, asyncio.Event()).set()
            return await super()._answer(request)
        self.requests.append((request.path, dict(request.headers), await request.read()))
        if how == "die":
            assert request.transport is not None
            request.transport.abort()
            await asyncio.Event().wait()
        if how == "hang":
            self.active += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.active -= 1
                self.aborted += 1
        await asyncio.sleep(self.wait_seconds)
        met.set()
        if how == "until taken":
            await self.rooms.setdefault(-room, asyncio.Event()).wait()
        return web.json_response({"text": "x"})


@contextlib.asynccontextmanager
async def fleet(prefills: int = 1, **settings: Any) -> AsyncIterator[tuple[ProxyServer, list[Half], Half]]:
    async with halves(prefills, 1, **settings) as (proxy, first, (decode,)):
        yield proxy, first, decode


@contextlib.asynccontextmanager
async def halves(
    prefills: int, decodes: int, **settings: Any
) -> AsyncIterator[tuple[ProxyServer, list[Half], list[Half]]]:
    rooms: dict[int, asyncio.Event] = {}
    first, last = [Half("prefill", rooms) for _ in range(prefills)], [Half("decode", rooms) for _ in range(decodes)]
    for engine in (*first, *last):
        await engine.start()
    async with proxy_before(*first, *last, **settings) as proxy:
        yield proxy, first, last


def asked(path: str, **fields: Any) -> bytes:
    if path == GENERATE:
        return post(path, {"text": TEXT, "sampling_params": {"max_new_tokens": 5}, **fields})
    common = {"model": "tiny", "max_tokens": 5, **fields}
    return post(path, chat(TEXT, **common) if path == CHAT else {"prompt": TEXT, **common})


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [True, False])
def test_both_halves_get_one_room_and_the_client_the_answer_of_decode(path: str, stream: bool) -> None:
    async def body() -> None:
        async with fleet() as (proxy, (prefill,), decode):
            evil = {"bootstrap_host": "10.9.9.9", "bootstrap_port": 1, "bootstrap_room": 7}
            options = {"stream_options": {"include_usage": True}} if stream else {}
            for _ in range(2):
                answer = await ask(proxy.port, asked(path, stream=stream, **options, **evil))
                assert answer.status == 200
            if stream:
                assert text_of(answer) == RIGHT
            await wait_until(lambda: proxy.ledger.in_flight == 0)
            assert b'prefill_legs_total{reason="handed_over"} 2.0' in proxy.front_end.metrics()
        halves, wholes = prefill.prompts, decode.prompts
        assert len({whole["bootstrap_room"] for whole in wholes}) == 2
        for half, whole in zip(halves, wholes, strict=True):
            assert [half[name] for name in ROOM] == [whole[name] for name in ROOM]
            assert (whole["bootstrap_host"], whole["bootstrap_port"]) == ("127.0.0.1", 8998)
            assert (half["stream"], whole["stream"]) == (False, stream)
            assert "stream_options" not in half
            assert ("return_token_ids" in whole) == (stream and path == COMPLETIONS)

    run(body())


@pytest.mark.parametrize("how", ["die", "status 500", "status 503"])
def test_a_prefill_engine_that_fails_costs_a_room_and_no_answer(how: str) -> None:
    async def body() -> None:
        async with fleet(2) as (proxy, prefills, decode):
            for engine in prefills:
                engine.how_half, engine.bad_halves = how, 1
            answer = await ask(proxy.port, asked(CHAT))
            assert answer.status == 200, answer.body
            await wait_until(lambda: decode.active == 0 and proxy.ledger.in_flight == 0, "nothing is left")
            assert b'retries_total{reason="prefill_failed"}' in proxy.front_end.metrics()
            assert proxy.registry.at(2).state == "ready"

    run(body())


def test_a_half_that_hangs_is_left_alone_when_others_are_there_and_used_when_not() -> None:
    timeouts = replace(QUICK, first_byte_seconds=0.3)

    async def body() -> None:
        async with halves(2, 1, timeouts=timeouts, router_mode="round-robin") as (proxy, (hung, well), (decode,)):
            hung.how_half = "hang"
            statuses = [(await ask(proxy.port, asked(CHAT, stream=True))).status for _ in range(20)]
            assert statuses.count(504) == len(hung.requests) == 5
            assert proxy.registry.at(0).state == "tripped"
            await wait_until(lambda: hung.aborted == decode.aborted == 5, "both were told to stop")
            assert (proxy.registry.at(1).state, len(well.requests)) == ("ready", 15)
            proxy.registry.at(1).draining = True  # a doubtful engine is better than none
            hung.how_half = "well"
            assert (await ask(proxy.port, asked(CHAT))).status == 200

    run(body())


def test_a_decode_engine_that_hangs_does_not_take_prefill_away_from_the_others() -> None:
    timeouts = replace(QUICK, first_byte_seconds=0.3)

    async def body() -> None:
        async with halves(1, 2, timeouts=timeouts, router_mode="round-robin") as (proxy, (prefill,), (_, hung)):
            prefill.how_half, hung.deaf = "until taken", True
            answers = [await ask(proxy.port, asked(CHAT, stream=True)) for _ in range(20)]
            assert [answer.status for answer in answers] == [200] * 20
            assert proxy.registry.at(2).state == "tripped"

    run(body())


@pytest.mark.parametrize("decode_refuses", [True, False])
@pytest.mark.parametrize("status", [400, 422])
def test_a_request_that_prefill_refuses_is_refused_at_once(status: int, decode_refuses: bool) -> None:
    async def body() -> None:
        async with fleet(2) as (proxy, prefills, decode):
            for engine in (*prefills, *([decode] if decode_refuses else [])):
                engine.how_half = f"status {status}"
            async with Client.to(proxy.port) as client:
                for number in range(1, 9):
                    client.send(post(CHAT, chat(TEXT, max_tokens=5, stream=True), "x-dynamo-route: 1"))
                    answer = await client.answer()
                    assert (answer.status, answer.json()["error"]["message"]) == (status, "no room")
                    receipt = orjson.loads(answer.headers["x-dynamo-route"])
                    assert receipt["engine"] in ("engine-0", "engine-1")
                    assert receipt["attempts"] == 1
                    assert sum(len(engine.requests) for engine in prefills) == number
            await wait_until(lambda: decode.active == 0 and proxy.ledger.in_flight == 0, "nothing is left")
            assert [engine.breaker.score for engine in proxy.registry] == [0, 0, 0]
            assert b"prefill_failed" not in proxy.front_end.metrics()

    run(body())


@pytest.mark.parametrize("status", [408, 429])
def test_a_prefill_engine_that_is_too_busy_costs_a_room(status: int) -> None:
    async def body() -> None:
        async with fleet() as (proxy, (prefill,), _):
            prefill.how_half, prefill.bad_halves = f"status {status}", 1
            assert (await ask(proxy.port, asked(CHAT))).status == 200
            assert len(prefill.requests) == 2
            assert proxy.registry.at(0).breaker.score == 0

    run(body())


def test_a_half_that_waits_for_decode_is_not_late_and_teaches_nothing() -> None:
    async def body() -> None:
        async with fleet(routing=Routing(prefill_seconds=0.05)) as (proxy, (prefill,), _):
            prefill.wait_seconds = 0.3
            told: list[float] = []
            proxy.router.first_byte = lambda placement, seconds: told.append(seconds)  # type: ignore[method-assign]
            assert (await ask(proxy.port, asked(CHAT))).status == 200
            assert len(prefill.requests) == 1
            assert set(told) == {0.0}
            assert b'prefill_legs_total{reason="timeout"}' not in proxy.front_end.metrics()

    run(body())


def test_a_refusal_in_chunks_comes_whole() -> None:
    async def body() -> None:
        async with fleet() as (proxy, (prefill,), _):
            prefill.how_half, prefill.in_chunks = "status 400", True
            async with Client.to(proxy.port) as client:
                for _ in range(2):
                    client.send(asked(CHAT))
                    answer = await client.answer()
                    assert (answer.status, answer.json()) == (400, {"error": {"message": "no room"}})

    run(body())


def test_a_decode_engine_that_lost_its_other_half_is_asked_again_in_another_room() -> None:
    async def body() -> None:
        async with fleet() as (proxy, (prefill,), decode):
            decode.bad_answers = 2
            answer = await ask(proxy.port, asked(COMPLETIONS))
            assert answer.status == 200
            rooms = {half["bootstrap_room"] for half in prefill.prompts}
            assert len(rooms) == len(prefill.prompts) >= 1
            decode.bad_answers = 100
            assert (await ask(proxy.port, asked(COMPLETIONS))).status == 502
            assert decode.bad_answers == 96

    run(body())


def test_without_a_prefill_engine_decode_gets_nothing_and_is_not_to_blame() -> None:
    async def body() -> None:
        async with fleet() as (proxy, (prefill,), decode):
            proxy.registry.at(0).draining = True
            for _ in range(8):
                answer = await ask(proxy.port, asked(CHAT))
                assert (answer.status, answer.json()["error"]["code"]) == (503, "no_prefill_engine")
            assert not decode.requests
            assert proxy.registry.at(1).state == "ready"
            proxy.registry.at(0).draining = False
            assert (await ask(proxy.port, asked(CHAT))).status == 200
            assert prefill.prompts

    run(body())


@pytest.mark.parametrize("lost_halves", [0, 1])
@pytest.mark.parametrize("how", ["cut", "half", "end"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, GENERATE])
def test_a_stream_that_breaks_goes_on_at_another_decode_engine_in_a_room_of_its_own(
    path: str, how: str, lost_halves: int
) -> None:
    async def body() -> None:
        async with halves(1, 2, router_mode="round-robin") as (proxy, (prefill,), decodes):
            for engine in decodes:
                engine.how, engine.break_after = how, 3 if path != GENERATE else 2  # not within a character
            other = decodes[1]
            other.break_after = None
            other.bad_answers = lost_halves  # the first room for the rest
            answer = await ask(proxy.port, asked(path, stream=True))
            if path == GENERATE:
                assert events_of(answer)[-1]["text"] == RIGHT
            else:
                assert text_of(answer) == RIGHT
            assert answer.body.endswith(b"data: [DONE]\n\n")
            assert b'stream_resumes_total{reason="resumed"} 1.0' in proxy.front_end.metrics()
            await wait_until(lambda: proxy.ledger.in_flight == 0, "nothing is left")
        halves_sent = [orjson.loads(body) for _, _, body in prefill.requests]
        wholes = [orjson.loads(body) for sent, _, body in other.requests if sent == path]
        where = "prompt" if path == COMPLETIONS else "input_ids"
        assert len(halves_sent) >= 2
        assert halves_sent[-1][where][: len(TEXT)] == [ord(letter) for letter in TEXT]
        (whole,) = wholes
        assert [halves_sent[-1][name] for name in ROOM] == [whole[name] for name in ROOM]
        assert whole["bootstrap_room"] != halves_sent[0]["bootstrap_room"]

    run(body())


def test_a_client_that_leaves_ends_both_halves() -> None:
    async def body() -> None:
        async with fleet() as (proxy, (prefill,), decode):
            prefill.how_half = "hang"
            async with Client.to(proxy.port) as client:
                client.send(asked(CHAT, stream=True))
                await wait_until(lambda: prefill.active == decode.active == 1, "both are asked")
            await wait_until(lambda: prefill.aborted == decode.aborted == 1, "both are told to stop")
            await wait_until(lambda: proxy.ledger.in_flight == 0)

    run(body())


@pytest.mark.parametrize(("path", "name"), [(COMPLETIONS, "prompt"), (GENERATE, "text"), (GENERATE, "input_ids")])
def test_a_batch_has_a_room_for_each_prompt(path: str, name: str) -> None:
    rooms = iter(range(1, 100))
    prompts = [[1], [2]] if name == "input_ids" else ["a", "b"]
    body = orjson.dumps({name: prompts, "stream": True})
    fields, half = handoff.in_a_room(path, body, "10.0.0.7", 8998, lambda: next(rooms))
    assert fields["bootstrap_host"] == ["10.0.0.7"] * 2
    assert len(set(fields["bootstrap_room"])) == 2
    assert orjson.loads(half) == {name: prompts, "stream": False, **fields}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": [], "text": ["a", "b"], "prompt": ["a", "b"], "input_ids": [[1], [2]]}),
        (COMPLETIONS, {"prompt": "one", "text": ["a", "b"], "input_ids": [[1], [2]]}),
        (COMPLETIONS, {"prompt": [1, 2], "text": ["a", "b"]}),
        (COMPLETIONS, {"text": ["a", "b"]}),
        (GENERATE, {"text": "one", "prompt": ["a", "b"], "input_ids": [[1], [2]]}),
        (GENERATE, {"text": None, "prompt": ["a", "b"], "input_ids": [1, 2]}),
    ],
)
def test_lists_that_its_route_does_not_read_make_no_batch(path: str, fields: dict[str, Any]) -> None:
    room, half = handoff.in_a_room(path, orjson.dumps(fields), "h", 1, lambda: 5)
    assert room == {"bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": 5}
    assert orjson.loads(half) == {**fields, **room, "stream": False}


def test_a_chat_with_stray_lists_gets_one_room_at_both_halves() -> None:
    async def body() -> None:
        async with fleet() as (proxy, (prefill,), decode):
            said = chat(TEXT, max_tokens=5) | {"text": ["a", "b"], "prompt": ["a", "b"]}
            assert (await ask(proxy.port, post(CHAT, said))).status == 200
            assert [type(half["bootstrap_room"]) for half in prefill.prompts + decode.prompts] == [int, int]

    run(body())


def test_only_a_prefill_engine_has_a_bootstrap_port() -> None:
    known = {"disaggregation_mode": "prefill", "disaggregation_bootstrap_port": 9000}
    assert dialects.sglang_bootstrap_port(known) == 9000
    for wrong in (
        None,
        [],
        {**known, "disaggregation_mode": "decode"},
        {**known, "disaggregation_bootstrap_port": "x"},
    ):
        assert dialects.sglang_bootstrap_port(wrong) == 0
