"""Asks one engine over HTTP, with prompts as token ids, and keeps what is timed or compared bit for bit."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

MODEL_NAME = "bench"
_LONGEST_ANSWER_SECONDS = 300
_CALM_SECONDS = 0.3


class Answer(NamedTuple):
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    ttft_seconds: float
    seconds: float
    #: From one piece of the answer to the next.
    gaps: tuple[float, ...] = ()


#: What vLLM's documentation tells a proxy to ask of the prefill engine.
_HAND_OUT = {"do_remote_decode": True, "do_remote_prefill": False}


class EngineClient:
    """One arm of the comparison, by its URL."""

    def __init__(self, name: str, url: str, session: aiohttp.ClientSession) -> None:
        self.name = name
        self.url = url
        self._session = session

    async def ask(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        logprobs: bool = False,
        ticket: dict[str, Any] | None = None,
        seen: list[float] | None = None,
    ) -> Answer:
        """A greedy streamed completion of `max_tokens` tokens. The clock starts with the request ready to send.

        `seen` gets the times at which pieces of it come, while they come.
        """
        body: dict[str, Any] = {
            "model": MODEL_NAME,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        if logprobs:
            body["logprobs"] = 1
        if ticket is not None:
            body["kv_transfer_params"] = ticket
        data, headers = json.dumps(body).encode(), {"content-type": "application/json"}
        tokens: list[int] = []
        values: list[float] = []
        times = [] if seen is None else seen
        first: float | None = None
        started = time.perf_counter()
        async with self._session.post(self.url + "/v1/completions", data=data, headers=headers) as answer:
            answer.raise_for_status()
            async for choice in _choices(answer):
                times.append(time.perf_counter())
                if first is None:
                    first = times[-1] - started
                tokens += choice.get("token_ids") or ()
                values += (choice.get("logprobs") or {}).get("token_logprobs") or ()
        if len(tokens) != max_tokens or first is None:
            raise RuntimeError(f"{self.name}: {len(tokens)} tokens came back, {max_tokens} were asked for")
        gaps = tuple(later - earlier for earlier, later in pairwise(times))
        return Answer(tuple(tokens), tuple(values), first, time.perf_counter() - started, gaps)

    async def hand_out(self, prompt: Sequence[int]) -> dict[str, Any]:
        """The prefill leg of a hand-off: computes the prompt, and says where its KV is."""
        body = {"model": MODEL_NAME, "prompt": list(prompt), "max_tokens": 1, "kv_transfer_params": _HAND_OUT}
        async with self._session.post(self.url + "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            ticket: dict[str, Any] | None = (await answer.json()).get("kv_transfer_params")
        if not ticket:
            raise RuntimeError(f"{self.name}: the answer carries no kv_transfer_params")
        return ticket

    async def counters(self) -> Counter[str]:
        """Every sample of /metrics, as `name` and, where it has a tier, reason or source, `name/label`."""
        async with self._session.get(self.url + "/metrics") as answer:
            text = await answer.text()
        found: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = [sample.labels[key] for key in ("tier", "reason", "source") if key in sample.labels]
                found["/".join([sample.name, *labels])] += sample.value
        return found

    async def calm(self, seconds: float = 8.0) -> bool:
        """Waits until nothing runs and no HBM block is held, so that background copies are done. False: in vain."""
        deadline = time.monotonic() + seconds
        while True:
            now = await self.counters()
            if now["vllm:kv_cache_usage_perc"] == 0 and now["vllm:num_requests_running"] == 0:
                break
            if time.monotonic() > deadline:
                print(f"{self.name} still holds HBM blocks after {seconds:.0f} s", flush=True)
                return False
            await asyncio.sleep(_CALM_SECONDS)
        await asyncio.sleep(_CALM_SECONDS)
        return True

    async def empty_hbm(self) -> None:
        """The engine forgets its own prefix cache; tiers below keep theirs."""
        await self.calm()
        async with self._session.post(self.url + "/reset_prefix_cache") as answer:
            answer.raise_for_status()


def session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=_LONGEST_ANSWER_SECONDS),
        connector=aiohttp.TCPConnector(limit=0),
        read_bufsize=1 << 20,
    )


async def _choices(answer: aiohttp.ClientResponse) -> Any:
    async for line in answer.content:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"the engine answered {event['error']}")
            for choice in event["choices"]:
                if choice.get("token_ids"):
                    yield choice
