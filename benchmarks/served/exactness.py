"""Answers after evict-and-reload against an engine without a tier whose prefixes never left HBM: tokens and logprobs.

Both engines run batch-invariant, so any difference is wrong KV. HBM of the tiered one is far too small for the prompts:
they are preempted, pushed out, and come back from DRAM and disk.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence

from benchmarks.served.client import Answer, EngineClient
from benchmarks.served.record import Record
from benchmarks.served.scale import Exact, Scale

#: What shows that a pass did what it is named after.
_EVIDENCE = (
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_hits_total",
    "vllm:external_prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total",
)
_OURS = ("dynamo_kvbm_hit_blocks_total", "dynamo_kvbm_load_failures_total", "dynamo_kvbm_dropped_blocks_total")


async def run(reference: EngineClient, tiered: EngineClient, scale: Scale, record: Record) -> None:
    prompts = make_prompts(scale)
    (cold, hbm_hit), first = await asyncio.gather(
        _reference(reference, prompts, scale.exact, record), _pass(tiered, prompts, scale.exact, record, "first")
    )
    reload_order = list(range(len(prompts)))
    random.Random(4).shuffle(reload_order)
    shuffled = await _pass(tiered, [prompts[index] for index in reload_order], scale.exact, record, "reload")
    reloaded = [answer for _, answer in sorted(zip(reload_order, shuffled, strict=True), key=lambda pair: pair[0])]
    _compare(record, "hbm_hit against cold, no tier", hbm_hit, cold)
    _compare(record, "first pass against hbm_hit", first, hbm_hit)
    _compare(record, "reload against hbm_hit", reloaded, hbm_hit)
    # The comparison must be able to fail: one other token in the first block, and nothing else, is wrong KV.
    count = min(64, len(prompts))
    damaged = [[prompt[0] ^ 1, *prompt[1:]] for prompt in prompts[:count]]
    other = await _pass(reference, damaged, scale.exact, record, "damaged")
    _compare(record, "control: one token of the first block changed", other, hbm_hit[:count])


def make_prompts(scale: Scale) -> list[list[int]]:
    rng, exact = random.Random(3), scale.exact
    lengths = [rng.randint(exact.shortest_tokens, exact.longest_tokens) for _ in range(exact.prompts)]
    return [[rng.randrange(10, scale.vocabulary) for _ in range(length)] for length in lengths]


async def _reference(
    client: EngineClient, prompts: Sequence[list[int]], exact: Exact, record: Record
) -> tuple[list[Answer], list[Answer]]:
    cold = await _pass(client, prompts, exact, record, "cold")
    return cold, await _pass(client, prompts, exact, record, "hbm_hit")


async def _pass(
    client: EngineClient, prompts: Sequence[list[int]], exact: Exact, record: Record, name: str
) -> list[Answer]:
    before = await client.counters()
    slots = asyncio.Semaphore(exact.concurrency)

    async def ask(prompt: list[int]) -> Answer:
        async with slots:
            return await client.ask(prompt, exact.answer_tokens, logprobs=True)

    answers = await asyncio.gather(*(ask(prompt) for prompt in prompts))
    await client.calm()
    moved = evidence(before, await client.counters())
    record.note("exact_pass", arm=client.name, name=name, prompts=len(prompts), **moved)
    record.say(f"exact, {name} on {client.name}: {len(prompts)} prompts; {moved}")
    return answers


def evidence(before: Counter[str], after: Counter[str]) -> dict[str, float]:
    wanted = [name for name in after if name in _EVIDENCE or name.partition("/")[0] in _OURS]
    return {name: after[name] - before[name] for name in sorted(wanted) if after[name] != before[name]}


def _compare(record: Record, what: str, got: Sequence[Answer], wanted: Sequence[Answer]) -> None:
    pairs = list(zip(got, wanted, strict=True))
    same_tokens = sum(a.tokens == b.tokens for a, b in pairs)
    same_all = sum(a.tokens == b.tokens and a.logprobs == b.logprobs for a, b in pairs)
    apart = max((abs(x - y) for a, b in pairs for x, y in zip(a.logprobs, b.logprobs, strict=True)), default=0.0)
    facts = {"same_tokens": same_tokens, "same_tokens_and_logprobs": same_all, "largest_logprob_difference": apart}
    record.note("exact", what=what, prompts=len(pairs), **facts)
    record.say(f"exact, {what}: {same_all} of {len(pairs)} bit-equal ({same_tokens} in tokens)")
