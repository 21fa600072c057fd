"""Clients that stream from real engines through dynamo-proxy, and count every answer that is not whole."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tools.vllm_server import MODEL_NAME


@dataclass
class Load:
    """Clients that stream one answer after the other; every answer must be whole."""

    session: aiohttp.ClientSession
    url: str
    is_over: bool = False
    whole: int = 0
    bad: list[str] = field(default_factory=list)

    async def client(self, number: int) -> None:
        chance = random.Random(number)
        while not self.is_over:
            tokens = chance.randrange(16, 64)
            body = {
                "model": MODEL_NAME,
                "prompt": [chance.randrange(5, 500) for _ in range(chance.randrange(20, 200))],
                "max_tokens": tokens,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            try:
                said = await self._ask(body)
            except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
                said = repr(error)
            if said == str(tokens):
                self.whole += 1
            else:
                self.bad.append(f"{tokens} tokens wanted: {said}")

    async def _ask(self, body: dict[str, Any]) -> str:
        """The number of tokens of a whole answer, or what is wrong with it."""
        async with self.session.post(self.url + "/v1/completions", json=body) as answer:
            text = await answer.text()
        if answer.status != 200 or not text.rstrip().endswith("data: [DONE]"):
            return f"{answer.status} {text[-300:]!r}"
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        return str(next((event["usage"]["completion_tokens"] for event in events if event.get("usage")), "no usage"))
