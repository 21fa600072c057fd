"""Streams of a real SGLang that are cut behind the proxy: chats, completions and its own route go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest
import requests

from soak.proxy.gate import Gate
from tests.proxy.proxy_fakes import ask, post, proxy_before, run
from tests.sglang.server import Server
from tests.sglang.tiny_model import word
from tests.vllm.proxied import PATIENT, Standing, aside

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
TOKENS = 60
_EVENTS = 8  # of a stream, until it is cut
WORDS = " ".join(word(token) for token in range(40, 60))
SAMPLING = {"temperature": 0, "ignore_eos": True}
OPENAI = {"max_tokens": TOKENS, "stream": True, "stream_options": {"include_usage": True}, **SAMPLING}
NATIVE = {"sampling_params": {"max_new_tokens": TOKENS, **SAMPLING}, "stream": True}
ASKED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": [{"role": "user", "content": WORDS}], **OPENAI}),
    (COMPLETIONS, {"prompt": WORDS, **OPENAI}),
    (GENERATE, {"text": WORDS, **NATIVE}),
    (GENERATE, {"input_ids": list(range(40, 60)), **NATIVE}),
]


def events_of(text: str) -> list[dict[str, Any]]:
    assert text.rstrip().endswith("data: [DONE]"), text[-300:]
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def answer_of(path: str, events: list[dict[str, Any]]) -> tuple[Any, ...]:
    """What a client gets in all: its text, and what is said of its tokens and its end."""
    if path == GENERATE:
        meta = events[-1]["meta_info"]
        counts = (meta["prompt_tokens"], meta["completion_tokens"])
        return events[-1]["text"], events[-1]["output_ids"], counts, meta["finish_reason"]
    choices = [choice for event in events for choice in event["choices"]]
    text = "".join(choice["text"] if "text" in choice else choice["delta"].get("content") or "" for choice in choices)
    ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    usages = [event["usage"] for event in events if event.get("usage")]
    return text, ends, [(usage["prompt_tokens"], usage["completion_tokens"]) for usage in usages]


class Breaking(Gate):
    """A gate that ends a stream after some events, as long as `faults` has one left."""

    def __init__(self, engine_port: int, faults: list[str]) -> None:
        super().__init__(engine_port)
        self.faults = faults

    async def _down(self, answers: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        events = 0
        with contextlib.suppress(OSError):
            while data := await answers.read(65536):
                pieces = data.split(b"data: ")
                if self.faults and events + len(pieces) > _EVENTS:
                    self.faults.pop()
                    # The client has the first events; else the request would begin anew, and nothing go on.
                    client.write(b"data: ".join(pieces[: _EVENTS - events]))
                    await client.drain()
                    break
                events += len(pieces) - 1 if self.faults else -events  # of this stream: connections are used again
                client.write(data)
                await client.drain()
        client.close()


class Gated(Standing):
    """The engine behind a gate that ends with the proxy."""

    def __init__(self, gate: Gate) -> None:
        super().__init__(f"http://127.0.0.1:{gate.port}")
        self.gate = gate

    async def stop(self) -> None:
        await self.gate.stop()


@pytest.mark.parametrize("breaks", [1, 2])
def test_a_stream_that_is_cut_goes_on_token_for_token(server: Server, breaks: int) -> None:
    async def shown() -> None:
        port, faults = int(server.process.url.rpartition(":")[2]), list[str]()
        engines = [Gated(await Breaking(port, faults).start()) for _ in range(3)]
        try:
            async with proxy_before(*engines, timeouts=PATIENT, router_mode="round-robin") as proxy:
                for number, (path, body) in enumerate(ASKED, 1):
                    body = {"model": str(server.model), **body}
                    alone = await aside(lambda: requests.post(server.process.url + path, json=body, timeout=120).text)  # noqa: B023
                    faults += ["cut"] * breaks
                    answer = await ask(proxy.port, post(path, body, "content-type: application/json"))
                    events = events_of(answer.body.decode())
                    assert answer_of(path, events) == answer_of(path, events_of(alone)), path
                    if path != GENERATE:
                        assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
                    assert not faults, "it was not cut"
                    told = f'stream_resumes_total{{reason="resumed"}} {number * breaks}.0'
                    assert told.encode() in proxy.front_end.metrics(), path
        finally:
            for engine in engines:
                await engine.gate.stop()

    run(shown())
