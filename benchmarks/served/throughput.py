"""What a tier costs when it never hits: the same number of unseen prompts through each arm, in turns."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

from benchmarks.served.client import EngineClient
from benchmarks.served.record import Record
from benchmarks.served.scale import Load, Scale


async def run(clients: Sequence[EngineClient], scale: Scale, record: Record) -> None:
    load = scale.load
    for turn in range(load.rounds):
        for client in clients[:: -1 if turn % 2 else 1]:
            # Prompts of their own for every turn, equal over the arms.
            rng = random.Random(1000 + turn)
            prompts = [
                [rng.randrange(10, scale.vocabulary) for _ in range(load.prompt_tokens)] for _ in range(load.requests)
            ]
            await client.calm()
            seconds = await _serve(client, prompts, load)
            tokens = load.requests * (load.prompt_tokens + load.answer_tokens)
            record.note("load", arm=client.name, round=turn, seconds=seconds, tokens_per_second=tokens / seconds)
    record.say(f"load: {load.requests} unseen prompts of {load.prompt_tokens} tokens, {load.concurrency} at a time")


async def _serve(client: EngineClient, prompts: list[list[int]], load: Load) -> float:
    waiting = iter(prompts)

    async def worker() -> None:
        for prompt in waiting:
            await client.ask(prompt, load.answer_tokens)

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(load.concurrency)))
    return time.perf_counter() - started
