"""The proxy before a real vLLM: streams that break go on, no token lost and none twice."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

import orjson
import pytest

pytest.importorskip("vllm")

from tests.proxy.proxy_fakes import ask, post, proxy_before, run
from tests.vllm.proxied import PATIENT
from tests.vllm.relay import Relay
from tools.server_process import ServerProcess
from tools.vllm_server import MODEL_NAME

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOKENS = 24
WORDS = " ".join(f"w{number}" for number in range(60, 120))


def events_of(body: bytes) -> list[dict[str, Any]]:
    """The events in an answer, framed in chunks or not."""
    return [orjson.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: {")]


def text_of(events: list[dict[str, Any]]) -> str:
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice["delta"].get("content") or "" if "delta" in choice else choice["text"] for choice in choices)


def ids_of(events: list[dict[str, Any]]) -> list[int]:
    return [token for event in events for choice in event["choices"] for token in choice.get("token_ids") or ()]


def resumed_of(asked: bytes) -> dict[str, Any]:
    """The one streamed request among those that an engine got; the proxy also asks for its name."""
    bodies = [json.JSONDecoder().raw_decode(rest.decode())[0] for rest in asked.split(b"\r\n\r\n") if rest[:1] == b"{"]
    (resumed,) = [body for body in bodies if body.get("stream")]
    return dict(resumed)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("cut_after", [1, 2, 9, 20])
def test_a_stream_of_a_real_engine_that_breaks_goes_on(engine: ServerProcess, path: str, cut_after: int) -> None:
    asked: dict[str, Any] = {"model": MODEL_NAME, "stream": True, "max_tokens": TOKENS, "temperature": 0}
    asked |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
    asked |= {"messages": [{"role": "user", "content": WORDS}]} if path == CHAT else {"prompt": WORDS}

    async def body() -> None:
        port = urlsplit(engine.url).port or 0
        breaking, good = await Relay(port, cut_after).start(), await Relay(port).start()
        settings = {"router_mode": "round-robin", "timeouts": PATIENT}
        async with proxy_before(breaking, good, **settings) as proxy:
            answer = await ask(proxy.port, post(path, asked, "content-type: application/json"))
            assert breaking.cuts == 1, answer.body
            assert b'stream_resumes_total{reason="resumed"} 1.0' in proxy.front_end.metrics()
        first, second = events_of(bytes(breaking.told)), events_of(bytes(good.told))
        prompt = next(ids for event in first for ids in prompt_ids(event))
        rest = resumed_of(bytes(good.asked))
        kept = len(rest["prompt"]) - len(prompt)
        assert rest["prompt"] == prompt + ids_of(first)[:kept]
        assert kept + len(ids_of(second)) == TOKENS
        mended = events_of(answer.body)
        texts = [text_of([event]) for event in first if ids_of([event])][:kept]
        assert text_of(mended) == "".join(texts) + text_of(second)
        assert mended[-1]["usage"]["completion_tokens"] == TOKENS
        assert mended[-1]["usage"]["prompt_tokens"] == len(prompt)
        assert mended[-2]["choices"][0]["finish_reason"] == "length"
        assert len({event["id"] for event in mended}) == 1
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert b'token_ids":[' not in answer.body

    run(body())


def prompt_ids(event: dict[str, Any]) -> list[list[int]]:
    places = [event, *event["choices"]]
    return [place["prompt_token_ids"] for place in places if place.get("prompt_token_ids")]
