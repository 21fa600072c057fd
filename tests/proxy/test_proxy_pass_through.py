"""What engines serve passes as it came: every route's body, query and answer, and adapters as models of their own."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from dynamo_proxy.openapi import JSON_ROUTES

from tests.proxy.proxy_fakes import Client, FakeEngine, RawEngine, ask, chat, post, proxy_before, run

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
FIELDS = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, PICTURE]}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "logprobs": True,
        "top_logprobs": 2,
    },
    "/v1/responses": {"input": [{"role": "user", "content": "hi"}], "reasoning": {"effort": "low"}},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "system": "be brief"},
    "/v1/embeddings": {"input": ["one", "two"], "dimensions": 8},
    "/v1/rerank": {"query": "q", "documents": ["a", "b"]},
    "/v1/score": {"text_1": "a", "text_2": ["b"]},
    "/generate": {"input_ids": [[1, 2], [3]], "sampling_params": {"max_new_tokens": 3}, "lora_path": ["a", None]},
    "/detokenize": {"tokens": [1, 2, 3]},
}
CHUNKS = b"5;note=1\r\nhello\r\n1\r\n \r\n0\r\nx-checksum: 7\r\n\r\n"


@pytest.mark.parametrize("path", sorted(JSON_ROUTES.keys() - {"/tokenize"}))
def test_every_route_passes_byte_for_byte_both_ways(path: str) -> None:
    body = json.dumps({"model": "tiny", **FIELDS.get(path, {"prompt": "hi"})}, indent=3).encode() + b"\n "

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Of-Engine: yes\r\n"
        writer.write(head + b"transfer-encoding: chunked\r\n\r\n" + CHUNKS)

    async def exchange() -> None:
        engine = await RawEngine(answer).start()
        async with proxy_before(engine) as proxy, Client.to(proxy.port) as client:
            client.send(post(f"{path}?api-version=1", body, "x-of-client: yes"))
            head = await client.head()
            assert (head.status, head.headers["x-of-engine"]) == (200, "yes")
            assert await client.reader.readexactly(len(CHUNKS)) == CHUNKS
        (request,) = engine.requests
        assert request.startswith(f"POST {path}?api-version=1 HTTP/1.1\r\n".encode())
        assert b"x-of-client: yes\r\n" in request
        assert request.endswith(b"\r\n\r\n" + body)

    run(exchange())


def test_a_client_may_have_its_text_tokenised() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy:
            answer = await ask(proxy.port, post("/tokenize", {"model": "tiny", "prompt": "ab"}))
            assert answer.json() == {"tokens": [97, 98], "count": 2}

    run(body())


class WithAdapter(FakeEngine):
    """Serves a model and an adapter of it, as vLLM lists them."""

    async def _models(self, request: web.Request) -> web.Response:
        base: dict[str, Any] = {"object": "model", "created": 1, "owned_by": "vllm"}
        data = [{**base, "id": "base"}, {**base, "id": "adapter", "parent": "base"}]
        return web.json_response({"object": "list", "data": data})


def test_an_adapter_goes_to_engines_that_have_it_and_its_prefixes_are_its_own() -> None:
    text = "the same long prompt " * 100

    async def body() -> None:
        both, plain = await WithAdapter().start(), await FakeEngine(("base",)).start()
        async with proxy_before(both, plain) as proxy:

            async def matched(model: str) -> int:
                request = post("/v1/chat/completions", {**chat(text), "model": model})
                answer = await ask(proxy.port, request)
                if model == "adapter":
                    assert answer.headers["x-dynamo-engine"] == "engine-0"
                return int(answer.headers["x-dynamo-matched-tokens"])

            assert [await matched(model) for model in ("adapter", "base")] == [0, 0]
            assert min([await matched(model) for model in ("adapter", "base")]) > 400

    run(body())
