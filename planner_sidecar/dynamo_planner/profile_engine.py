"""Measures one engine through its OpenAI port: prefill time over prompt length, time per token over batch and KV use.

The engine should have nothing else to do meanwhile. Prompts are random token ids, so that no prefix is found cached.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ObservationError
from .peers import Peers
from .profile_file import Profile

if TYPE_CHECKING:
    from aiohttp import ClientSession

_FIRST_TOKEN, _LAST_TOKEN = 10, 400  # ids that every vocabulary has
#: A short batch on a small engine is over in a fifth of a second.
_SCRAPE_SECONDS = 0.05


@dataclass(frozen=True)
class ProfilePlan:
    """What to measure. Lengths in tokens; every prefill is repeated and its median counts."""

    prompt_tokens: tuple[int, ...] = (128, 512, 2048, 8192)
    batches: tuple[int, ...] = (1, 4, 16, 64)
    decode_prompt_tokens: int = 256
    output_tokens: int = 64
    repeats: int = 3
    request_seconds: float = 300.0


class EngineProfiler:
    """One run against one engine. `seed` decides the prompts."""

    def __init__(self, session: ClientSession, url: str, plan: ProfilePlan, seed: int = 0) -> None:
        self._session = session
        self._url = url
        self._plan = plan
        self._peers = Peers(session, 10.0)
        self._source = random.Random(seed)
        self._model = ""

    async def run(self, say: Callable[[str], None]) -> Profile:
        """Raises ObservationError if the engine cannot be asked."""
        self._model = await self._find_model()
        await self._complete(self._prompt(16), 2)  # the first request compiles and warms
        prefill: list[tuple[float, float]] = []
        for tokens in self._plan.prompt_tokens:
            try:
                seconds = await self._prefill_seconds(tokens)
            except ObservationError as error:
                if error.reason != "refused" or not prefill:
                    raise
                say(f"prompts of {tokens} tokens are refused; stopping at {prefill[-1][0]:.0f}")
                break
            prefill.append((float(tokens), seconds))
            say(f"prefill of {tokens} tokens: {seconds * 1e3:.1f} ms")
        decode: list[tuple[float, float, float]] = []
        for batch in self._plan.batches:
            kv_usage, seconds = await self._decode_seconds(batch)
            decode.append((float(batch), kv_usage, seconds))
            say(f"batch of {batch}: {seconds * 1e3:.2f} ms a token, KV use {kv_usage:.0%}")
        return Profile(tuple(prefill), tuple(decode))

    async def _find_model(self) -> str:
        status, body = await self._peers.request("GET", f"{self._url}/v1/models")
        try:
            return str(json.loads(body)["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            text = f"{self._url}/v1/models answered {status} and names no model; is this an engine's URL?"
            raise ObservationError("not_an_engine", text) from error

    async def _prefill_seconds(self, tokens: int) -> float:
        spent = []
        for _ in range(self._plan.repeats):
            began = time.perf_counter()
            times = await self._complete(self._prompt(tokens), 1)
            spent.append(times[0] - began)
        return statistics.median(spent)

    async def _decode_seconds(self, batch: int) -> tuple[float, float]:
        """(KV use while they run, mean seconds per token)."""
        requests = [
            asyncio.ensure_future(
                self._complete(self._prompt(self._plan.decode_prompt_tokens), self._plan.output_tokens)
            )
            for _ in range(batch)
        ]
        usage = 0.0
        try:
            while not all(request.done() for request in requests):
                await asyncio.wait(requests, timeout=_SCRAPE_SECONDS)
                usage = max(usage, await self._kv_usage())
            streams = [await request for request in requests]
        finally:
            for request in requests:
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)
        gaps = [(times[-1] - times[0]) / (len(times) - 1) for times in streams if len(times) > 1]
        if not gaps:
            raise ObservationError("no_tokens", f"{self._url} streamed no second token; does it stream at all?")
        return usage, statistics.fmean(gaps)

    async def _kv_usage(self) -> float:
        try:
            return (await self._peers.scrape(self._url)).kv_usage or 0.0
        except ObservationError:
            return 0.0

    def _prompt(self, tokens: int) -> list[int]:
        return [self._source.randrange(_FIRST_TOKEN, _LAST_TOKEN) for _ in range(tokens)]

    async def _complete(self, prompt: list[int], output_tokens: int) -> list[float]:
        """When each token of one streamed answer came. Raises ObservationError."""
        import aiohttp

        body: dict[str, Any] = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        limit, times = aiohttp.ClientTimeout(total=self._plan.request_seconds), []
        try:
            async with self._session.post(f"{self._url}/v1/completions", json=body, timeout=limit) as answer:
                if answer.status != 200:
                    text = (await answer.text())[:200]
                    raise ObservationError("refused", f"{self._url} answered {answer.status}: {text}")
                async for line in answer.content:
                    if line.startswith(b"data:") and b"[DONE]" not in line:
                        times.append(time.perf_counter())
        except (asyncio.TimeoutError, TimeoutError) as error:
            text = f"{self._url} gave no whole answer in {self._plan.request_seconds:g} s"
            raise ObservationError("timeout", text) from error
        except (aiohttp.ClientError, OSError) as error:
            raise ObservationError("unreachable", f"{self._url} cannot be reached: {error or error!r}") from error
        if not times:
            raise ObservationError("no_tokens", f"{self._url} streamed no token; does it stream at all?")
        return times
