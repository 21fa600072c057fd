"""Time to first token of one long prefix: computed, held in HBM, and brought back by a tier."""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.served.client import Answer, EngineClient
from benchmarks.served.record import Record
from benchmarks.served.scale import Scale

_ANSWER_TOKENS = 4


async def run(clients: Sequence[EngineClient], scale: Scale, record: Record) -> None:
    """Rounds of tier hits go through the arms in turn, every second round backwards, on the same prompts."""
    size, rng = scale.prefix, random.Random(1)
    warm_up, *prompts = (
        [rng.randrange(10, scale.vocabulary) for _ in range(size.tokens)] for _ in range(size.prompts + 1)
    )
    for client in clients:
        await client.ask(warm_up, _ANSWER_TOKENS)
        await client.ask(warm_up[: size.tokens // 2], _ANSWER_TOKENS)
        for number, prompt in enumerate(prompts):
            for kind in ("cold", "hbm"):
                answer = await client.ask(prompt, _ANSWER_TOKENS)
                _note(record, client, kind, number, 0, answer)
    for turn in range(size.rounds):
        for client in clients[:: -1 if turn % 2 else 1]:
            await client.empty_hbm()
            before = await client.counters()
            for number, prompt in enumerate(prompts):
                _note(record, client, "tier", number, turn, await client.ask(prompt, _ANSWER_TOKENS))
            hits = (await client.counters())["vllm:external_prefix_cache_hits_total"]
            hit_tokens = hits - before["vllm:external_prefix_cache_hits_total"]
            record.note("prefix_hits", arm=client.name, round=turn, hit_tokens=hit_tokens, prompts=size.prompts)
    record.say(f"prefix of {size.tokens} tokens: {len(clients)} arms, {size.prompts} prompts, {size.rounds} rounds")


def _note(record: Record, client: EngineClient, kind: str, prompt: int, turn: int, answer: Answer) -> None:
    facts = {"ttft": answer.ttft_seconds, "tokens": answer.tokens}
    record.note("prefix", arm=client.name, kind=kind, prompt=prompt, round=turn, **facts)
