"""Time to first token of one long prefix: computed, held in HBM, and brought back by a tier."""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.served import disk
from benchmarks.served.arms import NONE
from benchmarks.served.client import Answer, EngineClient
from benchmarks.served.record import Record
from benchmarks.served.scale import Scale

_ANSWER_TOKENS = 4
_HIT_TOKENS = "vllm:external_prefix_cache_hits_total"


def make_prompts(scale: Scale) -> list[list[int]]:
    size, rng = scale.prefix, random.Random(1)
    return [[rng.randrange(10, scale.vocabulary) for _ in range(size.tokens)] for _ in range(size.prompts)]


async def run(clients: Sequence[EngineClient], scale: Scale, record: Record) -> None:
    """Rounds of tier hits go through the arms in turn, every second round backwards, on the same prompts."""
    prompts, warm_up = make_prompts(scale), list(range(10, 10 + scale.prefix.tokens // 2))
    for client in clients:
        for _ in range(2):
            await client.ask([token % scale.vocabulary for token in warm_up], _ANSWER_TOKENS)
        for number, prompt in enumerate(prompts):
            for kind in ("cold", "hbm"):
                answer = await client.ask(prompt, _ANSWER_TOKENS)
                _note(record, client, kind, number, answer)
        await disk.written(client)
    tiered = [client for client in clients if client.name != NONE]
    for turn in range(scale.prefix.rounds):
        for client in tiered[:: -1 if turn % 2 else 1]:
            await client.empty_hbm()
            before = await client.counters()
            for number, prompt in enumerate(prompts):
                _note(record, client, "tier", number, await client.ask(prompt, _ANSWER_TOKENS))
            hit_tokens = (await client.counters())[_HIT_TOKENS] - before[_HIT_TOKENS]
            record.note("prefix_hits", arm=client.name, round=turn, hit_tokens=hit_tokens, prompts=len(prompts))
    record.say(f"prefix of {scale.prefix.tokens} tokens: {len(prompts)} prompts, {scale.prefix.rounds} rounds")


def _note(record: Record, client: EngineClient, kind: str, prompt: int, answer: Answer) -> None:
    facts = {"ttft": answer.ttft_seconds, "tokens": answer.tokens}
    record.note("prefix", arm=client.name, kind=kind, prompt=prompt, **facts)
