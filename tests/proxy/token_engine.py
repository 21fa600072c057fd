"""An engine whose next token is a function of all tokens before it: a resumed stream is right or visibly wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web

from tests.proxy.proxy_fakes import FakeEngine

_HELD = 5  # tokens divisible by it show their text with the next token, as half characters do


def next_token(tokens: Sequence[int]) -> int:
    return (sum(tokens) * 31 + len(tokens) * 7) % 997


def expected_text(prompt: Sequence[int], count: int) -> str:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return "".join(f"{token} " for token in tokens[len(prompt) :])


def chat_ids(messages: list[dict[str, Any]]) -> list[int]:
    return [ord(letter) for message in messages for letter in message["content"]]


class TokenEngine(FakeEngine):
    """Streams tokens as vLLM does, ids included when asked. `break_after` events it does what `how` says."""

    def __init__(self, owner: str = "vllm", context: int | None = 4096) -> None:
        super().__init__()
        self.owner = owner
        self.context = context
        self.break_after: int | None = None
        self.how = "cut"
        self.tokens_per_event = 1
        self.delta_key = "content"
        self.served = 0

    async def _models(self, request: web.Request) -> web.Response:
        entry = {"id": "tiny", "object": "model", "created": 1, "owned_by": self.owner, "max_model_len": self.context}
        return web.json_response({"object": "list", "data": [entry]})

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        asked = orjson.loads(self.requests[-1][2])
        self.served += 1
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        events = self._events(asked, request.path.endswith("chat/completions"))
        for number, event in enumerate(events):
            if number == self.break_after:
                await self._break(request, response, event)
                return response
            await response.write(event)
            await asyncio.sleep(0)
        return response

    async def _break(self, request: web.Request, response: web.StreamResponse, event: bytes) -> None:
        assert request.transport is not None
        if self.how == "hang":
            self.hold = asyncio.Event()
            await self.hold.wait()
        elif self.how == "half":
            await response.write(event[: len(event) // 2])
            await asyncio.sleep(0.02)
            request.transport.abort()
        elif self.how == "error":
            await response.write(b'data: {"error":{"message":"dead","type":"InternalServerError","code":500}}\n\n')
            await response.write(b"data: [DONE]\n\n")
        elif self.how == "abort":
            await response.write(event.replace(b'"finish_reason":null', b'"finish_reason":"abort"'))
        elif self.how == "cut":
            await asyncio.sleep(0.02)
            request.transport.abort()
        # "end": the stream ends as if it were whole

    def _events(self, asked: dict[str, Any], is_chat: bool) -> list[bytes]:
        prompt = chat_ids(asked["messages"]) if is_chat else asked["prompt"]
        if isinstance(prompt, str):
            prompt = [ord(letter) for letter in prompt]
        limit = asked.get("max_completion_tokens") or asked.get("max_tokens") or 16
        common = {"id": f"{self.port}-{self.served}", "created": self.served, "model": asked["model"]}
        common["object"] = "chat.completion.chunk" if is_chat else "text_completion"
        tells = bool(asked.get("return_token_ids"))
        events = []
        if is_chat:
            start = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            events.append({**common, "choices": [start], "prompt_token_ids": prompt if tells else None})
        tokens, held, fresh = list(prompt), "", []
        for number in range(limit):
            token = next_token(tokens)
            tokens.append(token)
            fresh.append(token)
            held += f"{token} "
            last = number == limit - 1
            if len(fresh) < self.tokens_per_event and not last:
                continue
            text, held = ("", held) if token % _HELD == 0 and not last else (held, "")
            choice: dict[str, Any] = (
                {"index": 0, "delta": {self.delta_key: text}} if is_chat else {"index": 0, "text": text}
            )
            if is_chat and not text:
                choice["delta"] = {}
            choice |= {
                "logprobs": None,
                "finish_reason": "length" if last else None,
                "token_ids": fresh if tells else None,
            }
            if not is_chat and not events and tells:
                choice["prompt_token_ids"] = prompt
            events.append({**common, "choices": [choice]})
            fresh = []
        if (asked.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": len(prompt), "completion_tokens": limit, "total_tokens": len(prompt) + limit}
            events.append({**common, "choices": [], "usage": usage})
        return [b"data: " + orjson.dumps(event) + b"\n\n" for event in events] + [b"data: [DONE]\n\n"]
