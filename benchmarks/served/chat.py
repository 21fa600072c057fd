"""Chats of many users whose KV together exceeds HBM. Every arm gets the same users, words and thinking times."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

from benchmarks.served.client import EngineClient
from benchmarks.served.record import Record
from benchmarks.served.scale import Scale


async def run(clients: Sequence[EngineClient], scale: Scale, record: Record) -> None:
    for client in clients:
        await client.empty_hbm()
        before, started = await client.counters(), time.perf_counter()
        await asyncio.gather(*(_user(client, scale, number, record) for number in range(scale.chat.users)))
        seconds, after = time.perf_counter() - started, await client.counters()
        names = ("vllm:prefix_cache_hits_total", "vllm:external_prefix_cache_hits_total", "vllm:prompt_tokens_total")
        moved = {name: after[name] - before[name] for name in names}
        record.note("chat_arm", arm=client.name, seconds=seconds, users=scale.chat.users, **moved)
        record.say(f"chat on {client.name}: {seconds:.0f} s")


async def _user(client: EngineClient, scale: Scale, number: int, record: Record) -> None:
    chat, rng = scale.chat, random.Random(5000 + number)
    history = [rng.randrange(10, scale.vocabulary) for _ in range(chat.first_tokens)]
    await asyncio.sleep(rng.uniform(0, chat.think_seconds))
    for turn in range(chat.turns):
        answer = await client.ask(history, chat.answer_tokens)
        record.note("chat", arm=client.name, user=number, turn=turn, ttft=answer.ttft_seconds, tokens=len(history))
        history += answer.tokens
        history += [rng.randrange(10, scale.vocabulary) for _ in range(chat.turn_tokens)]
        await asyncio.sleep(rng.expovariate(1 / chat.think_seconds))
