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


def word_of(token: int, has_halves: bool = False) -> str:
    return f" {token} " if has_halves and token % _HELD == 0 else f"{token} "


def expected_text(prompt: Sequence[int], count: int, has_halves: bool = False) -> str:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return "".join(word_of(token, has_halves) for token in tokens[len(prompt) :])


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
        self.prints_halves = False  # what comes before half of a character is shown at once
        self.served = 0

    async def _models(self, request: web.Request) -> web.Response:
        entry = {"id": "tiny", "object": "model", "created": 1, "owned_by": self.owner, "max_model_len": self.context}
        return web.json_response({"object": "list", "data": [entry]})

    def _events_of(self, path: str, asked: dict[str, Any]) -> list[bytes]:
        return self._events(asked, path.endswith("chat/completions"))

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        asked = orjson.loads(self.requests[-1][2])
        self.served += 1
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        events = self._events_of(request.path, asked)
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
            held += word_of(token, self.prints_halves)
            last = number == limit - 1
            if len(fresh) < self.tokens_per_event and not last:
                continue
            cut = len(held)
            if token % _HELD == 0 and not last:
                cut = cut - len(f"{token} ") if self.prints_halves else 0
            text, held = held[:cut], held[cut:]
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


class SglangEngine(TokenEngine):
    """Streams as SGLang does: its chats tell no ids, its own route all of them with every event."""

    def __init__(self) -> None:
        super().__init__("sglang")
        self.reads_ids = True  # of a chat's prompt
        self.counts = True  # the tokens of a chat in every event
        self.other_words = False  # its tokeniser makes other tokens of a text than the model did
        self.tokenizer = "well"  # or "none", or "hangs"
        self.own_template = False  # of SGLang's conversations, with stop strings that a chat of ids goes without
        self.tells_news_alone = False  # in the events of its own route

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append((request.path, dict(request.headers), await request.read()))
        text = body.get("prompt")
        if self.tokenizer == "hangs":
            await asyncio.Event().wait()
        if self.tokenizer == "none":
            return web.Response(status=404)
        if self.own_template and "add_generation_prompt" in body:
            return web.json_response({"error": {"message": "supported only with a Jinja chat template"}}, status=400)
        if text is None:
            ids = chat_ids(body["messages"])
        elif text.replace(" ", "").isdigit():
            ids = [int(word) for word in text.split()]
            if self.other_words and len(ids) > 1:
                ids[:2] = [int(f"{ids[0]}"[:-1] or 0), int(f"{ids[0]}"[-1]), ids[1]][-2:]
        else:
            ids = [ord(letter) for letter in text]
        return web.json_response({"tokens": ids, "count": len(ids), "max_model_len": self.context})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.path != "/detokenize":
            return await super()._answer(request)
        return web.json_response({"text": [self._text(ids) for ids in (await request.json())["tokens"]]})

    def _text(self, ids: list[int]) -> str:
        words = [word_of(token, self.prints_halves) for token in ids]
        if self.prints_halves and ids and ids[-1] % _HELD == 0:
            words[-1] = " \ufffd"
        return "".join(words)

    def _events_of(self, path: str, asked: dict[str, Any]) -> list[bytes]:
        if path == "/generate":
            return self._native_events(asked)
        if not path.endswith("chat/completions"):
            return super()._events_of(path, asked)
        if self.reads_ids and "input_ids" in asked:
            asked = {**asked, "messages": [{"content": "".join(map(chr, asked["input_ids"]))}]}
        options, events = asked.get("stream_options") or {}, []
        prompt, count = len(chat_ids(asked["messages"])), 0
        for event in super()._events({**asked, "return_token_ids": True}, True):
            said = orjson.loads(event[6:]) if event.startswith(b"data: {") else {}
            said.pop("prompt_token_ids", None)
            for choice in said.get("choices", ()):
                count += len(choice.pop("token_ids", None) or ())
                choice["delta"] |= {"reasoning_content": None}
                if choice["delta"].get("content") and options.get("continuous_usage_stats") and self.counts:
                    said["usage"] = usage_of(prompt, count)
                last, choice["finish_reason"] = choice["finish_reason"], None
                if choice["delta"].get("content") or choice["delta"].get("role"):
                    events.append(b"data: " + orjson.dumps(said) + b"\n\n")
                if last:
                    end = {"index": 0, "delta": {"reasoning_content": None}, "finish_reason": last}
                    said.pop("usage", None)
                    events.append(b"data: " + orjson.dumps({**said, "choices": [end]}) + b"\n\n")
            if not said.get("choices"):
                events.append(event)
        return events

    def _native_events(self, asked: dict[str, Any]) -> list[bytes]:
        prompt = asked.get("input_ids") or [ord(letter) for letter in asked["text"]]
        sampling, events, text, ids, held = asked.get("sampling_params") or {}, [], "", [], ""
        limit = sampling.get("max_new_tokens", 128)
        for number in range(limit):
            ids = [*ids, next_token([*prompt, *ids])]
            held += f"{ids[-1]} "
            last = number == limit - 1
            if ids[-1] % _HELD or last:
                text, held = text + held, ""
            meta: dict[str, Any] = {"id": f"{self.port}-{self.served}", "prompt_tokens": len(prompt)}
            meta |= {
                "completion_tokens": len(ids),
                "finish_reason": {"type": "length", "length": limit} if last else None,
            }
            told = ids[-1:] if self.tells_news_alone else ids
            events.append({"text": text, "output_ids": told, "meta_info": meta})
        return [b"data: " + orjson.dumps(event) + b"\n\n" for event in events] + [b"data: [DONE]\n\n"]


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "total_tokens": total, "completion_tokens": completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 0}}  # fmt: skip
