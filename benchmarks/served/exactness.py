"""Answers after evict-and-reload against an engine without a tier whose prefixes never left HBM: tokens and logprobs.

Both engines run in vLLM's batch-invariant mode. HBM of the tiered one is far too small for the prompts: they are pushed
out and come back from DRAM and disk. The mode is not exact: the tail of a prompt computed beside many others may differ
in its last bits from the same tail computed beside few, and a preempted request prefills what it had generated. So the
engine without a tier is asked for its hits in both ways, and the first token, which depends on loaded KV and the tail
alone, has to be one of the two.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

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
#: More than the tiered engine's HBM holds, fewer than its DRAM does.
_ALONE = 48
_OURS = ("dynamo_kvbm_hit_blocks_total", "dynamo_kvbm_load_failures_total", "dynamo_kvbm_dropped_blocks_total")


async def run(reference: EngineClient, tiered: EngineClient, scale: Scale, record: Record) -> None:
    prompts, exact = make_prompts(scale), scale.exact
    wanted, got = await asyncio.gather(
        _reference(reference, prompts, exact, record), _tiered(tiered, prompts, exact, record)
    )
    _compare(record, "no tier: hit against cold", wanted.crowded, wanted.cold)
    _compare(record, "no tier: hit among few against hit among many", wanted.calm, wanted.crowded)
    _compare(record, "first pass, preempted, against cold", got.cold, wanted.cold)
    _compare(record, "reload, preempted, against either hit", got.crowded, wanted.crowded, wanted.calm)
    _compare(record, "reload, never preempted, against either hit", got.calm, wanted.crowded, wanted.calm)
    _compare(record, "reload against the other reload", got.calm, got.crowded)
    # The engine is idle when such a request comes: what is in DRAM arrives layer by layer, ahead of its computation.
    few, brief = prompts[-_ALONE:], replace(exact, answer_tokens=2)
    both = await asyncio.gather(*(_alone(client, few, brief, record) for client in (tiered, reference)))
    _compare(record, "reload, alone, against the hit alone", *both)
    # The comparison must be able to fail: one other token in the first block, and nothing else, is wrong KV.
    damaged = [[prompt[0] ^ 1, *prompt[1:]] for prompt in prompts[: exact.batch]]
    other = await _pass(reference, damaged, exact.concurrency, exact, record)
    count = len(damaged)
    what = "control: one token of the first block changed"
    _compare(record, what, other, wanted.crowded[:count], wanted.calm[:count])


def make_prompts(scale: Scale) -> list[list[int]]:
    rng, exact = random.Random(3), scale.exact
    lengths = [rng.randint(exact.shortest_tokens, exact.longest_tokens) for _ in range(exact.prompts)]
    return [[rng.randrange(10, scale.vocabulary) for _ in range(length)] for length in lengths]


async def _alone(client: EngineClient, prompts: Sequence[list[int]], exact: Exact, record: Record) -> list[Answer]:
    """One at a time, the second time around: by then the prompts are the latest in DRAM, and too many for HBM."""
    await _pass(client, prompts, 1, exact, record)
    return await _pass(client, prompts, 1, exact, record)


class _Passes(NamedTuple):
    """Answers in the order of the prompts. Among many, and among few that come one by one."""

    cold: list[Answer]
    crowded: list[Answer]
    calm: list[Answer]


async def _reference(client: EngineClient, prompts: Sequence[list[int]], exact: Exact, record: Record) -> _Passes:
    """In batches that fit into HBM: what was computed cold is asked again before it is pushed out."""
    passes = _Passes([], [], [])
    for start in range(0, len(prompts), exact.batch):
        batch = prompts[start : start + exact.batch]
        passes.cold.extend(await _pass(client, batch, exact.concurrency, exact, record))
        passes.crowded.extend(await _pass(client, batch, exact.concurrency, exact, record))
        passes.calm.extend(await _shuffled(client, batch, exact.calm_concurrency, exact, record))
    return passes


async def _tiered(client: EngineClient, prompts: Sequence[list[int]], exact: Exact, record: Record) -> _Passes:
    first = await _pass(client, prompts, exact.concurrency, exact, record)
    crowded = await _shuffled(client, prompts, exact.concurrency, exact, record)
    return _Passes(first, crowded, await _shuffled(client, prompts, exact.calm_concurrency, exact, record))


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

    async def ask(index: int, prompt: list[int]) -> Answer:
        # Answers are all of one length: without this the requests of a calm pass would still come in waves.
        if concurrency == exact.calm_concurrency:
            await asyncio.sleep(index * exact.calm_seconds)
        async with slots:
            return await client.ask(prompt, exact.answer_tokens, logprobs=True)

    answers = await asyncio.gather(*(ask(index, prompt) for index, prompt in enumerate(prompts)))
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


def _compare(record: Record, what: str, got: Sequence[Answer], *references: Sequence[Answer]) -> None:
    """Against the reference that agrees longest."""
    places = [
        max((first_difference(mine, other) for other in others), key=lambda place: math.inf if place is None else place)
        for mine, *others in zip(got, *references, strict=True)
    ]
    differ = {index: place for index, place in enumerate(places) if place is not None}
    same, first = len(got) - len(differ), sum(place == 0 for place in differ.values())
    record.note("exact", what=what, differ=differ, prompts=len(got), same=same, first_token_differs=first)
    record.say(f"exact, {what}: {same} of {len(got)} bit-equal, {first} differ in their first token")
