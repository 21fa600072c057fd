"""Everything fails at random, under load: no request is lost before its first byte, no token twice or missing."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random

import pytest
from aiohttp import web

from tests.proxy.proxy_fakes import QUICK, Answer, ask, chat, post, proxy_before, run, wait_until
from tests.proxy.test_proxy_resume import CHAT, COMPLETIONS, events_of, text_of
from tests.proxy.token_engine import TokenEngine, expected_text

STREAMS, AT_ONCE = 160, 32
FAULTS = ("cut", "half", "error", "abort", "end", "hang")


class ChaosEngine(TokenEngine):
    """Dies, refuses, hangs and stutters as its dice say."""

    def __init__(self, rng: Random) -> None:
        super().__init__()
        self._rng = rng
        self.wild = True

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        fate = self._rng.random() if self.wild else 1.0
        self.tokens_per_event = self._rng.choice((1, 1, 2))
        if fate < 0.1:
            return web.json_response({"error": {"message": "busy"}}, status=503)
        if fate < 0.2 and request.transport is not None:
            request.transport.abort()
        self.break_after = self._rng.randrange(0, 30) if fate < 0.5 else None
        self.how = self._rng.choice(FAULTS)
        return await super()._answer(request)

    async def _break(self, request: web.Request, response: web.StreamResponse, event: bytes) -> None:
        if self.how == "hang":
            await asyncio.sleep(3600)  # until its client has enough
        await super()._break(request, response, event)


def judged(answer: Answer, whole: str) -> bool:
    """True for a whole stream; a broken one must say so and be a true beginning. Everything else is a failure."""
    assert answer.status == 200, answer.body
    events = events_of(answer)
    if "error" in events[-1]:
        assert events.pop()["error"]["code"] == "engine_lost"
        answer.body = answer.body[: answer.body.rindex(b"data: ")]
        assert whole.startswith(text_of(answer))
        return False
    assert text_of(answer) == whole
    assert answer.body.endswith(b"data: [DONE]\n\n")
    return True


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_is_lost_and_no_token_is_wrong(seed: int) -> None:
    async def body() -> None:
        rng = Random(seed)
        engines = [await ChaosEngine(Random(seed * 100 + number)).start() for number in range(4)]
        engines[3].wild = False  # one of them is well: a request that no engine can take is no test
        timeouts = replace(QUICK, idle_seconds=1.0, first_byte_seconds=20.0)
        async with proxy_before(*engines, router_mode="random", timeouts=timeouts) as proxy:
            turn = asyncio.Semaphore(AT_ONCE)

            async def one(number: int) -> bool:
                text, limit = f"request {number}", rng.randrange(5, 40)
                async with turn:
                    common = {"model": "tiny", "stream": True, "max_tokens": limit}
                    asked = {**common, "prompt": text} if number % 2 else chat(text, **common)
                    answer = await ask(proxy.port, post(COMPLETIONS if number % 2 else CHAT, asked))
                return judged(answer, expected_text([ord(letter) for letter in text], limit))

            async def drain_now_and_then() -> None:
                while True:
                    engine = proxy.registry.at(rng.randrange(3))
                    engine.draining = True
                    await asyncio.sleep(0.1)
                    engine.draining = False
                    await asyncio.sleep(0.1)

            draining = asyncio.ensure_future(drain_now_and_then())
            try:
                whole = await asyncio.gather(*(one(number) for number in range(STREAMS)))
            finally:
                draining.cancel()
                await asyncio.gather(draining, return_exceptions=True)
            assert sum(whole) >= STREAMS * 0.9
            assert b'stream_resumes_total{reason="resumed"}' in proxy.front_end.metrics()
            await wait_until(lambda: proxy.ledger.in_flight == 0 and not proxy.front_end.clients, "nothing is left")

    run(body())
