"""Answers after evict-and-reload against an engine without a tier whose prefixes never left HBM: tokens and logprobs.

Both engines run in vLLM's batch-invariant mode. HBM of the tiered one is far too small for the prompts: they are pushed
out and come back from DRAM and disk. The mode is not exact between a prompt computed whole and one of which only the
tail is computed, nor for a preempted request, whose generated tokens are prefilled again: so hits are compared with
hits, and where an answer differs the first token that does is told. The first token of all depends on loaded KV alone.
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
    prompts, exact = make_prompts(scale), scale.exact
    (cold, hbm_hit), first = await asyncio.gather(
        _reference(reference, prompts, exact, record),
        _pass(tiered, prompts, exact.concurrency, exact, record),
    )
    preempted = await _shuffled(tiered, prompts, exact.concurrency, exact, record)
    calm = await _shuffled(tiered, prompts, exact.calm_concurrency, exact, record)
    _compare(record, "no tier: HBM hit against cold", hbm_hit, cold)
    _compare(record, "first pass, preempted, against cold", first, cold)
    _compare(record, "reload, preempted, against HBM hit", preempted, hbm_hit)
    _compare(record, "reload, never preempted, against HBM hit", calm, hbm_hit)
    # The comparison must be able to fail: one other token in the first block, and nothing else, is wrong KV.
    damaged = [[prompt[0] ^ 1, *prompt[1:]] for prompt in prompts[: exact.batch]]
    other = await _pass(reference, damaged, exact.concurrency, exact, record)
    _compare(record, "control: one token of the first block changed", other, hbm_hit[: exact.batch])


def make_prompts(scale: Scale) -> list[list[int]]:
    rng, exact = random.Random(3), scale.exact
    lengths = [rng.randint(exact.shortest_tokens, exact.longest_tokens) for _ in range(exact.prompts)]
    return [[rng.randrange(10, scale.vocabulary) for _ in range(length)] for length in lengths]


async def _reference(
    client: EngineClient, prompts: Sequence[list[int]], exact: Exact, record: Record
) -> tuple[list[Answer], list[Answer]]:
    """In batches that fit into HBM: what was computed cold is asked again before it is pushed out."""
    cold: list[Answer] = []
    hits: list[Answer] = []
    for start in range(0, len(prompts), exact.batch):
        batch = prompts[start : start + exact.batch]
        cold += await _pass(client, batch, exact.concurrency, exact, record)
        hits += await _pass(client, batch, exact.concurrency, exact, record)
    return cold, hits


async def _shuffled(
    client: EngineClient, prompts: Sequence[list[int]], concurrency: int, exact: Exact, record: Record
) -> list[Answer]:
    order = list(range(len(prompts)))
    random.Random(concurrency).shuffle(order)
    answers = await _pass(client, [prompts[index] for index in order], concurrency, exact, record)
    return [answer for _, answer in sorted(zip(order, answers, strict=True), key=lambda pair: pair[0])]


async def _pass(
    client: EngineClient, prompts: Sequence[list[int]], concurrency: int, exact: Exact, record: Record
) -> list[Answer]:
    before = await client.counters()
    slots = asyncio.Semaphore(concurrency)

    async def ask(prompt: list[int]) -> Answer:
        async with slots:
            return await client.ask(prompt, exact.answer_tokens, logprobs=True)

    answers = await asyncio.gather(*(ask(prompt) for prompt in prompts))
    await client.calm()
    moved = evidence(before, await client.counters())
    record.note("exact_pass", arm=client.name, concurrency=concurrency, prompts=len(prompts), **moved)
    record.say(f"exact, {client.name}: {len(prompts)} prompts, {concurrency} at a time; {moved}")
    return answers


def evidence(before: Counter[str], after: Counter[str]) -> dict[str, float]:
    wanted = [name for name in after if name in _EVIDENCE or name.partition("/")[0] in _OURS]
    return {name: after[name] - before[name] for name in sorted(wanted) if after[name] != before[name]}


def first_difference(got: Answer, wanted: Answer) -> int | None:
    """Index of the first token that differs, in itself or in its logprob."""
    pairs = zip(
        zip(got.tokens, got.logprobs, strict=True), zip(wanted.tokens, wanted.logprobs, strict=True), strict=True
    )
    return next((index for index, (mine, other) in enumerate(pairs) if mine != other), None)


def _compare(record: Record, what: str, got: Sequence[Answer], wanted: Sequence[Answer]) -> None:
    pairs = list(zip(got, wanted, strict=True))
    places = [first_difference(mine, other) for mine, other in pairs]
    differ = {index: place for index, place in enumerate(places) if place is not None}
    same, first = len(pairs) - len(differ), sum(place == 0 for place in differ.values())
    tokens = sum(mine.tokens == other.tokens for mine, other in pairs)
    facts = {"prompts": len(pairs), "same": same, "same_tokens": tokens, "first_token_differs": first}
    record.note("exact", what=what, differ=differ, **facts)
    record.say(
        f"exact, {what}: {same} of {len(pairs)} bit-equal, {tokens} in tokens; {first} differ in their first token"
    )
