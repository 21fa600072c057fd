"""Streams that break after their first byte: they go on elsewhere, token for token, or end honestly."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import orjson
import pytest
from dynamo_proxy.server import ProxyServer
from dynamo_proxy.stream_tape import StreamTape, framed, is_resumable

from tests.proxy.proxy_fakes import QUICK, Answer, ask, chat, post, proxy_before, run, wait_until
from tests.proxy.token_engine import TokenEngine, chat_ids, expected_text

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXT = "tell me a story"
PROMPT = [ord(letter) for letter in TEXT]


def events_of(answer: Answer) -> list[dict[str, Any]]:
    blocks = answer.body.split(b"\n\n")
    assert blocks.pop() == b""
    return [orjson.loads(block.removeprefix(b"data: ")) for block in blocks if block != b"data: [DONE]"]


def text_of(answer: Answer) -> str:
    choices = [choice for event in events_of(answer) for choice in event.get("choices", ())]
    return "".join(choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices)


@contextlib.asynccontextmanager
async def broken_and_good(
    break_after: int | None, how: str = "cut", **settings: Any
) -> AsyncIterator[tuple[ProxyServer, TokenEngine, TokenEngine]]:
    """A proxy whose first request goes to the engine that breaks."""
    broken, good = await TokenEngine().start(), await TokenEngine().start()
    broken.break_after, broken.how = break_after, how
    async with proxy_before(broken, good, router_mode="round-robin", **settings) as proxy:
        yield proxy, broken, good  # type: ignore[misc]


def resumes(proxy: ProxyServer, reason: str) -> bool:
    return f'stream_resumes_total{{reason="{reason}"}} 1.0'.encode() in proxy.front_end.metrics()


@pytest.mark.parametrize("how", ["cut", "half", "error", "abort", "end"])
@pytest.mark.parametrize("break_after", [1, 2, 7, 23])
def test_a_broken_chat_goes_on_token_for_token(how: str, break_after: int) -> None:
    async def body() -> None:
        async with broken_and_good(break_after, how) as (proxy, broken, good):
            asked = chat(TEXT, stream=True, max_tokens=24, stream_options={"include_usage": True})
            answer = await ask(proxy.port, post(CHAT, asked))
            assert text_of(answer) == expected_text(chat_ids(asked["messages"]), 24)
            assert answer.body.endswith(b"data: [DONE]\n\n")
            events = events_of(answer)
            assert {(event["id"], event["object"]) for event in events} == {
                (f"{broken.port}-1", "chat.completion.chunk")
            }
            assert events[-1]["usage"] == {"prompt_tokens": 15, "completion_tokens": 24, "total_tokens": 39}
            assert events[-2]["choices"][0]["finish_reason"] == "length"
            assert b'token_ids":[' not in answer.body
            assert [path for path, _, _ in good.requests] == [COMPLETIONS]
            assert resumes(proxy, "resumed")

    run(body())


@pytest.mark.parametrize("prompt", [TEXT, PROMPT], ids=["text", "ids"])
@pytest.mark.parametrize("per_event", [1, 3])
def test_a_broken_completion_goes_on_token_for_token(prompt: Any, per_event: int) -> None:
    async def body() -> None:
        async with broken_and_good(3) as (proxy, broken, _):
            broken.tokens_per_event = per_event
            asked = {"model": "tiny", "prompt": prompt, "stream": True, "max_tokens": 20, "temperature": 0}
            answer = await ask(proxy.port, post(COMPLETIONS, asked))
            assert text_of(answer) == expected_text(PROMPT, 20)
            assert resumes(proxy, "resumed")

    run(body())


def test_a_stream_outlives_several_engines() -> None:
    async def body() -> None:
        engines = [await TokenEngine().start() for _ in range(4)]
        for engine in engines[:3]:
            engine.break_after = 6
        async with proxy_before(*engines, router_mode="round-robin") as proxy:
            asked = chat(TEXT, stream=True, max_tokens=40)
            answer = await ask(proxy.port, post(CHAT, asked))
            assert text_of(answer) == expected_text(PROMPT, 40)
            assert [engine.served for engine in engines] == [1, 1, 1, 1]

    run(body())


def test_a_chat_without_a_limit_goes_on_to_the_end_of_the_context() -> None:
    async def body() -> None:
        async with broken_and_good(4) as (proxy, _, good):
            await ask(proxy.port, post(CHAT, chat(TEXT, stream=True)))
            sent = orjson.loads(good.requests[0][2])
            assert sent["max_tokens"] + len(sent["prompt"]) == 4096

    run(body())


def test_a_hung_stream_goes_on_after_the_idle_deadline() -> None:
    async def body() -> None:
        timeouts = replace(QUICK, idle_seconds=0.2)
        async with broken_and_good(5, "hang", timeouts=timeouts) as (proxy, broken, _):
            answer = await ask(proxy.port, post(CHAT, chat(TEXT, stream=True, max_tokens=12)))
            assert text_of(answer) == expected_text(PROMPT, 12)
            assert broken.hold is not None
            broken.hold.set()
            await wait_until(lambda: proxy.ledger.in_flight == 0)

    run(body())


@pytest.mark.parametrize("how", ["cut", "end"])
@pytest.mark.parametrize("left", [0, 1])
def test_a_stream_whose_last_token_came_is_concluded_without_an_engine(left: int, how: str) -> None:
    async def body() -> None:
        # events: role, 8 tokens, usage, [DONE]
        async with broken_and_good(9 + left, how) as (proxy, _, good):
            asked = chat(TEXT, stream=True, max_tokens=8, stream_options={"include_usage": True})
            answer = await ask(proxy.port, post(CHAT, asked))
            events = events_of(answer)
            assert events[-1]["usage"]["completion_tokens"] == 8
            assert len(events) == 10
            assert answer.body.endswith(b"data: [DONE]\n\n")
            assert (good.served, resumes(proxy, "concluded")) == (0, True)

    run(body())


def test_without_another_engine_or_when_turned_off_the_client_is_told() -> None:
    async def body(single: bool) -> None:
        async with broken_and_good(5, resume_streams=single) as (proxy, _, good):
            if single:
                good.status = 500
            answer = await ask(proxy.port, post(CHAT, chat(TEXT, stream=True, max_tokens=24)))
            whole = expected_text(PROMPT, 24)
            *events, last = events_of(answer)
            assert last["error"]["code"] == "engine_lost"
            assert events
            assert whole.startswith("".join(e["choices"][0]["delta"].get("content", "") for e in events))
            assert b"return_token_ids" not in good.requests[-1][2] if good.requests and not single else True

    run(body(True))
    run(body(False))


def test_an_engine_that_refuses_the_rest_is_not_to_blame() -> None:
    async def body() -> None:
        async with broken_and_good(5) as (proxy, _, good):
            good.status = 400
            answer = await ask(proxy.port, post(CHAT, chat(TEXT, stream=True, max_tokens=24)))
            assert events_of(answer)[-1]["error"]["code"] == "engine_lost"
            assert proxy.registry.find(good.address).breaker.score == 0

    run(body())


@pytest.mark.parametrize(
    "fields",
    [{"tools": [{}]}, {"stop": ["x"]}, {"n": 2}, {"logprobs": True}, {"response_format": {"type": "json_object"}},
     {"return_token_ids": True}, {"stream": False}, {"max_tokens": "24"}, {"min_tokens": 2.0},
     {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}],
)  # fmt: skip
def test_what_token_ids_alone_cannot_continue_is_left_alone(fields: dict[str, Any]) -> None:
    assert is_resumable(CHAT, chat(stream=True))
    assert not is_resumable(CHAT, chat(**{"stream": True, **fields}))


def test_thoughts_are_not_resumed() -> None:
    async def body() -> None:
        async with broken_and_good(5) as (proxy, broken, good):
            broken.delta_key = "reasoning"
            answer = await ask(proxy.port, post(CHAT, chat(TEXT, stream=True, max_tokens=24)))
            assert events_of(answer)[-1]["error"]["code"] == "engine_lost"
            assert (good.served, resumes(proxy, "not_resumable")) == (0, True)

    run(body())


@pytest.mark.parametrize("owner", ["sglang", "someone"])
def test_engines_that_do_not_tell_ids_are_not_asked(owner: str) -> None:
    async def body() -> None:
        engine = await TokenEngine(owner).start()
        async with proxy_before(engine) as proxy:
            answer = await ask(proxy.port, post(CHAT, chat(TEXT, stream=True, max_tokens=4)))
            assert text_of(answer) == expected_text(PROMPT, 4)
            assert b"return_token_ids" not in engine.requests[0][2]

    run(body())


def test_an_error_that_is_no_stream_passes_in_its_own_words() -> None:
    async def body() -> None:
        engine = await TokenEngine().start()
        engine.status = 400
        async with proxy_before(engine) as proxy:
            answer = await ask(proxy.port, post(CHAT, chat(TEXT, stream=True)))
            assert (answer.status, answer.json()) == (400, {"error": {"message": "no"}})

    run(body())


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_the_tape_relays_whole_events_however_they_come(step: int) -> None:
    engine = TokenEngine()
    asked = {**chat(TEXT, max_tokens=9), "return_token_ids": True}
    raw = b"".join(engine._events(asked, True))
    tape = StreamTape(True)
    relayed = b"".join(tape.feed(raw[start : start + step]) for start in range(0, len(raw), step))
    plain = b"".join(engine._events({**asked, "return_token_ids": False}, True))
    if step == 10_000:
        assert relayed == framed(plain)
    assert (tape.tokens, tape.finished, tape.done) == (9, True, True)
    tape.check()
