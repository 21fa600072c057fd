"""How a prompt gets its answer: from one of equal engines, or from a prefill and a decode engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple, Protocol

from benchmarks.served.client import Answer, EngineClient


class Served(NamedTuple):
    """`ttft` counts from the first leg on."""

    answer: Answer
    prefill_leg: float
    ttft: float
    decoder: EngineClient


class Route(Protocol):
    name: str
    #: Where decodes run.
    decoders: Sequence[EngineClient]

    @property
    def engines(self) -> Sequence[EngineClient]: ...

    async def serve(self, prompt: Sequence[int], max_tokens: int) -> Served: ...


class Aggregated:
    """Equal engines, one after the other."""

    def __init__(self, name: str, engines: Sequence[EngineClient]) -> None:
        self.name = name
        self.engines = self.decoders = list(engines)
        self._turn = cycle(self.engines)

    async def serve(self, prompt: Sequence[int], max_tokens: int) -> Served:
        engine = next(self._turn)
        answer = await engine.ask(prompt, max_tokens)
        return Served(answer, 0.0, answer.ttft_seconds, engine)


class Apart:
    """Prompts below `threshold` tokens go to the decode engine alone."""

    def __init__(self, name: str, prefill: EngineClient, decode: EngineClient, threshold: int = 0) -> None:
        self.name = name
        self.prefill, self.decode, self.threshold = prefill, decode, threshold
        self.engines, self.decoders = [prefill, decode], [decode]

    async def serve(self, prompt: Sequence[int], max_tokens: int) -> Served:
        if len(prompt) < self.threshold:
            answer = await self.decode.ask(prompt, max_tokens)
            return Served(answer, 0.0, answer.ttft_seconds, self.decode)
        started = time.perf_counter()
        ticket = await self.prefill.hand_out(prompt)
        leg = time.perf_counter() - started
        answer = await self.decode.ask(prompt, max_tokens, ticket=ticket)
        ttft = time.perf_counter() - started - answer.seconds + answer.ttft_seconds
        return Served(answer, leg, ttft, self.decode)
