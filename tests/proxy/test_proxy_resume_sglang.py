"""Streams of SGLang that break: chats and its own route go on where no token can be lost or doubled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from dynamo_proxy.http1 import Request
from dynamo_proxy.http_heads import RequestHead
from dynamo_proxy.intake import Asked
from dynamo_proxy.outgoing import Outgoing
from dynamo_proxy.server import ProxyServer
from dynamo_proxy.sglang_tapes import ChatTape, CompletionTape, GenerateTape
from dynamo_proxy.stream_tape import is_resumable

from tests.proxy.proxy_fakes import Answer, Client, ask, chat, post, proxy_before, run, wait_until
from tests.proxy.test_proxy_resume import CHAT, COMPLETIONS, PROMPT, TEXT, events_of, resumes, text_of
from tests.proxy.token_engine import SglangEngine, TokenEngine, expected_text, next_token

GENERATE = "/generate"


@contextlib.asynccontextmanager
async def broken_and_good(
    break_after: int, how: str = "cut", **settings: Any
) -> AsyncIterator[tuple[ProxyServer, SglangEngine, SglangEngine]]:
    """A proxy whose first request goes to the engine that breaks."""
    broken, good = SglangEngine(), SglangEngine()
    for engine in (broken, good):
        await engine.start()
    broken.break_after, broken.how = break_after, how
    async with proxy_before(broken, good, router_mode="round-robin", **settings) as proxy:
        yield proxy, broken, good


def native(count: int = 24, **fields: Any) -> dict[str, Any]:
    prompt = {"text": TEXT} if "input_ids" not in fields else {}
    return {**prompt, "sampling_params": {"max_new_tokens": count, "temperature": 0}, "stream": True, **fields}


def is_told_of_the_loss(answer: Answer) -> bool:
    return events_of(answer)[-1].get("error", {}).get("code") == "engine_lost" and b"[DONE]" not in answer.body


@pytest.mark.parametrize("how", ["cut", "half", "error", "abort", "end"])
@pytest.mark.parametrize("break_after", [2, 7, 15])
@pytest.mark.parametrize("options", [{"include_usage": True}, None])
def test_a_chat_goes_on_token_for_token(how: str, break_after: int, options: Any) -> None:
    async def body() -> None:
        async with broken_and_good(break_after, how) as (proxy, broken, good):
            asked = chat(TEXT, stream=True, max_tokens=24, stream_options=options)
            answer = await ask(proxy.port, post(CHAT, asked))
            assert text_of(answer) == expected_text(PROMPT, 24)
            assert answer.body.endswith(b"data: [DONE]\n\n")
            events = events_of(answer)
            assert {(event["id"], event["created"]) for event in events} == {(f"{broken.port}-1", 1)}
            if options:
                assert events.pop()["usage"] == {"prompt_tokens": 15, "completion_tokens": 24, "total_tokens": 39}
            assert b"usage" not in b"".join(orjson.dumps(event) for event in events)
            assert [event["choices"][0]["finish_reason"] for event in events][-2:] == [None, "length"]
            assert answer.body.count(b'"finish_reason":"length"') == answer.body.count(b'"role"') == 1
            assert [path for path, _, _ in good.requests] == ["/tokenize", "/tokenize", CHAT]
            assert resumes(proxy, "resumed")

    run(body())


def test_a_chat_and_a_native_stream_outlive_several_engines() -> None:
    async def body() -> None:
        engines = [SglangEngine() for _ in range(4)]
        for engine in engines:
            await engine.start()
        for engine in engines[:3]:
            engine.break_after = 6
        async with proxy_before(*engines, router_mode="round-robin") as proxy:
            answer = await ask(proxy.port, post(CHAT, chat(TEXT, stream=True, max_tokens=40)))
            assert text_of(answer) == expected_text(PROMPT, 40)
            for engine in engines[:3]:
                engine.break_after = 3
            answer = await ask(proxy.port, post(GENERATE, native(20)))
            assert events_of(answer)[-1]["text"] == expected_text(PROMPT, 20)

    run(body())


@pytest.mark.parametrize("lack", ["reads_ids", "counts", "other_words", "own_template"])
def test_a_chat_whose_tokens_cannot_be_shown_ends_with_an_error(lack: str) -> None:
    async def body() -> None:
        async with broken_and_good(7) as (proxy, broken, good):
            for engine in (broken, good):
                setattr(engine, lack, not getattr(engine, lack))
            answer = await ask(proxy.port, post(CHAT, chat(TEXT, stream=True, max_tokens=24)))
            assert is_told_of_the_loss(answer)
            assert expected_text(PROMPT, 24).startswith(said := text_of(answer))
            assert said
            assert not resumes(proxy, "resumed")
            assert [engine.breaker.score for engine in proxy.registry if engine.address == good.address] == [0.0]
            await wait_until(lambda: proxy.ledger.in_flight == 0)

    run(body())


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_stream_that_breaks_at_any_event_loses_no_half_of_a_character(path: str) -> None:
    """SGLang shows what comes before half of a character with the token that brings the half."""

    async def body() -> None:
        ids, whole = list(PROMPT), expected_text(PROMPT, 16, has_halves=True)
        for _ in range(16):
            ids.append(next_token(ids))
        halves = {number for number, token in enumerate(ids[len(PROMPT) :], 1) if token % 5 == 0}
        assert halves
        for events in (*halves, *(after + 1 for after in halves), 15):
            async with broken_and_good(events + (path == CHAT)) as (proxy, broken, good):
                broken.prints_halves = good.prints_halves = True
                common = {"model": "tiny", "max_tokens": 16, "stream": True}
                asked = chat(TEXT, **common) if path == CHAT else {"prompt": TEXT, **common}
                answer = await ask(proxy.port, post(path, asked))
                if events in halves:
                    assert is_told_of_the_loss(answer)
                    assert resumes(proxy, "not_exact")
                    assert whole.startswith(text_of(answer))
                else:
                    assert text_of(answer) == whole, events

    run(body())


def test_a_chat_does_not_go_on_at_an_engine_of_another_kind() -> None:
    async def body() -> None:
        broken, other = SglangEngine(), TokenEngine()
        for engine in (broken, other):
            await engine.start()
        broken.break_after = 5
        async with proxy_before(broken, other, router_mode="round-robin") as proxy:
            answer = await ask(proxy.port, post(CHAT, chat(TEXT, stream=True, max_tokens=24)))
            assert is_told_of_the_loss(answer)
            assert (other.requests, resumes(proxy, "no_engine")) == ([], True)

    run(body())


def test_the_rest_of_a_completion_may_be_asked_of_an_engine_of_any_kind() -> None:
    async def body() -> None:
        async with proxy_before(await TokenEngine().start()) as proxy:
            path = "/v1/completions"
            head = RequestHead(b"POST", path.encode(), 1, b"", False, True, False, path)
            asked = orjson.dumps({"model": "tiny", "prompt": TEXT, "stream": True, "max_tokens": 24})
            outgoing, tape = Outgoing(Asked(Request(head, asked)), path), CompletionTape()
            outgoing.tape = tape
            choice = {"index": 0, "text": "ab", "finish_reason": None, "token_ids": [5], "prompt_token_ids": [1, 2]}
            tape.feed(b"data: " + orjson.dumps({"id": "1", "choices": [choice]}) + b"\n\n")
            assert outgoing.plan_rest(1 << 16)[0] == "go_on"
            assert [outgoing.lacks_rest(engine) for engine in proxy.registry] == [False]

    run(body())


def test_a_rest_that_is_known_is_not_asked_of_an_engine_of_another_kind() -> None:
    async def body() -> None:
        broken, refusing, other = SglangEngine(), SglangEngine(), TokenEngine()
        for engine in (broken, refusing, other):
            await engine.start()
        broken.break_after, refusing.status = 5, 503
        async with proxy_before(broken, refusing, other, router_mode="round-robin") as proxy:
            answer = await ask(proxy.port, post(CHAT, chat(TEXT, stream=True, max_tokens=24)))
            assert is_told_of_the_loss(answer)
            assert [path for path, _, _ in refusing.requests] == ["/tokenize", "/tokenize", CHAT]
            assert other.requests == []
            assert all(engine.breaker.score == 0 for engine in proxy.registry if engine.address == other.address)

    run(body())


@pytest.mark.parametrize("how", ["cut", "half", "error", "end"])
@pytest.mark.parametrize("prompt", [{}, {"input_ids": PROMPT}], ids=["text", "ids"])
def test_a_native_stream_goes_on_token_for_token(how: str, prompt: dict[str, Any]) -> None:
    async def body() -> None:
        async with broken_and_good(5, how) as (proxy, broken, good):
            answer = await ask(proxy.port, post(GENERATE, native(**prompt)))
            events, ids = events_of(answer), list(PROMPT)
            for number, event in enumerate(events):
                ids.append(next_token(ids))
                assert event["output_ids"] == ids[len(PROMPT) :]
                meta = {"id": f"{broken.port}-1", "prompt_tokens": len(PROMPT), "completion_tokens": number + 1}
                reason = {"type": "length", "length": 24} if number == 23 else None
                assert event["meta_info"] == {**meta, "finish_reason": reason}
            assert events[-1]["text"] == expected_text(PROMPT, 24)
            assert answer.body.endswith(b"data: [DONE]\n\n")
            assert orjson.loads(good.requests[-1][2])["sampling_params"]["max_new_tokens"] == 24 - 5
            assert resumes(proxy, "resumed")

    run(body())


def test_a_native_stream_that_breaks_within_a_character_or_tells_news_alone_ends_with_an_error() -> None:
    async def body(how: str) -> None:
        ids = list(PROMPT)
        while (ids.append(next_token(ids)), ids[-1] % 5)[1]:
            pass
        held = len(ids) - len(PROMPT)
        async with broken_and_good(held if how == "held" else held + 2) as (proxy, broken, good):
            broken.tells_news_alone = good.tells_news_alone = how == "news"
            answer = await ask(proxy.port, post(GENERATE, native()))
            assert is_told_of_the_loss(answer)
            assert resumes(proxy, "not_exact")

    run(body("held"))
    run(body("news"))


def test_a_native_stream_whose_last_token_came_is_concluded() -> None:
    async def body() -> None:
        async with broken_and_good(8) as (proxy, _, good):
            answer = await ask(proxy.port, post(GENERATE, native(8)))
            assert answer.body.endswith(b"data: [DONE]\n\n")
            assert (len(events_of(answer)), good.requests, resumes(proxy, "concluded")) == (8, [], True)

    run(body())


def test_an_engine_that_does_not_tokenise_is_passed_over() -> None:
    async def body() -> None:
        engines = [SglangEngine() for _ in range(3)]
        for engine in engines:
            await engine.start()
        engines[0].break_after, engines[1].tokenizer = 5, "none"
        async with proxy_before(*engines, router_mode="round-robin") as proxy:
            answer = await ask(proxy.port, post(CHAT, chat(TEXT, stream=True, max_tokens=24)))
            assert text_of(answer) == expected_text(PROMPT, 24)
            assert [engine.served for engine in engines] == [1, 0, 1]

    run(body())


def test_a_chat_that_is_nested_too_deep_for_the_tape_passes_as_it_came() -> None:
    async def body() -> None:
        async with broken_and_good(99) as (proxy, _, _):
            deep = b"[" * 400 + b"]" * 400
            asked = orjson.dumps(chat(TEXT, stream=True, max_tokens=4, stream_options={"include_usage": True}))
            answer = await ask(proxy.port, post(CHAT, asked[:-1] + b',"metadata":' + deep + b"}"))
            assert (answer.status, text_of(answer)) == (200, expected_text(PROMPT, 4))

    run(body())


def test_a_client_that_leaves_while_an_engine_is_asked_ends_it_all() -> None:
    async def body() -> None:
        async with broken_and_good(5) as (proxy, _, good):
            good.tokenizer = "hangs"
            async with Client.to(proxy.port) as client:
                client.send(post(CHAT, chat(TEXT, stream=True, max_tokens=24)))
                await client.head()
                await wait_until(lambda: bool(good.requests), "the next engine is asked")
                assert proxy.ledger.in_flight == 1
            await wait_until(lambda: proxy.ledger.in_flight == 0, "nothing is left of it")

    run(body())


def test_a_client_that_left_just_as_the_answer_came_does_not_hear_of_it() -> None:
    class Left:
        over = False

        def __init__(self) -> None:
            self.heard: list[str] = []

        def on_rest(self, reason: str) -> None:
            self.heard.append(reason)

        def on_fault(self) -> None:
            self.heard.append("fault")

    async def body() -> None:
        async with proxy_before(await TokenEngine().start()) as proxy:
            (engine,), head = proxy.registry, RequestHead(b"POST", CHAT.encode(), 1, b"", False, True, False, CHAT)
            outgoing, left = Outgoing(Asked(Request(head, b"{}")), CHAT), Left()
            outgoing.tape = ChatTape()
            task = outgoing.seek_rest(engine, proxy.tokens, left)
            await asyncio.sleep(0)
            assert task.done()
            left.over = True
            await asyncio.sleep(0)
            assert left.heard == []

    run(body())


def test_an_event_that_gives_no_reason_does_not_end_a_native_stream() -> None:
    tape = GenerateTape()
    event = b'data: {"text": "a", "output_ids": [1], "meta_info": {"finish_reason": %b}}\n\n'
    tape.feed(event % b"null")
    assert not tape.finished
    tape.feed(event % b'{"type": "stop"}')
    assert tape.finished


@pytest.mark.parametrize("field", ["json_schema", "regex", "ebnf"])
def test_a_completion_under_a_grammar_of_sglang_is_left_alone(field: str) -> None:
    asked = {"prompt": TEXT, "stream": True}
    assert is_resumable(COMPLETIONS, asked)
    assert not is_resumable(COMPLETIONS, {**asked, field: "x"})


@pytest.mark.parametrize(
    "fields",
    [{"return_logprob": True}, {"input_ids": [[1], [2]]}, {"image_data": ["x"]}, {"stream": False},
     {"sampling_params": {"stop": "x"}}, {"sampling_params": {"n": 2}}, {"sampling_params": [{}]},
     {"sampling_params": {"json_schema": "{}"}}, {"sampling_params": {"max_new_tokens": "3"}}, {"text": ["a", "b"]}],
)  # fmt: skip
def test_what_ids_alone_cannot_continue_is_left_alone(fields: dict[str, Any]) -> None:
    assert is_resumable(GENERATE, native())
    assert not is_resumable(GENERATE, {**native(**fields), **fields})
