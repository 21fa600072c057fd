"""What is measured of engines that prefill and decode apart, and of equal ones beside them."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from benchmarks.served.client import EngineClient
from benchmarks.served.record import Record
from benchmarks.served.routes import Apart, Route

#: What hand-offs are counted by: ours, then vLLM's own.
COUNTERS = (
    "dynamo_nixl_read_bytes_total",
    "dynamo_nixl_reads_total",
    "dynamo_nixl_window_blocks_total",
    "dynamo_kvbm_hit_blocks_total/peer",
    "dynamo_nixl_unexported_blocks_total",
    "vllm:nixl_bytes_transferred_sum",
    "vllm:nixl_xfer_time_seconds_sum",
    "vllm:nixl_num_failed_transfers_total",
    "vllm:nixl_num_kv_expired_reqs_total",
    "vllm:num_preemptions_total",
)
_FAILURES = "dynamo_kvbm_load_failures_total"
_ANSWER_TOKENS = 4
#: A prompt's effect on streams beside it is looked for until so long after its first token.
_AFTER_SECONDS = 0.3
#: Until streams have begun.
_STREAMS_SECONDS = 2.0


@dataclass(frozen=True)
class ApartScale:
    vocabulary: int
    block_tokens: int
    #: Ends 8 tokens behind a whole block, as in `scale.Prefix`.
    lengths: tuple[int, ...]
    prompts: int
    streams: int
    stream_tokens: int
    load_seconds: float
    #: What has no answer so long after the last request is given up.
    drain_seconds: float
    long_tokens: tuple[int, int]
    long_per_second: float
    short_tokens: int
    short_answer: int
    short_per_second: float
    long_answer: int
    equal_prompts: int
    equal_tokens: int
    equal_answer: int


H200 = ApartScale(
    128_000, 16, (1_024, 4_096, 16_384, 32_768), prompts=3, streams=16, stream_tokens=3_000, load_seconds=35.0,
    drain_seconds=15.0,
    long_tokens=(8_192, 16_384), long_per_second=1.2, short_tokens=256, short_answer=256, short_per_second=12.0,
    long_answer=16, equal_prompts=20, equal_tokens=1_024, equal_answer=16,
)  # fmt: skip
TINY = ApartScale(
    500, 32, (128, 512, 1_024), prompts=2, streams=2, stream_tokens=400, load_seconds=6.0,
    drain_seconds=120.0,
    long_tokens=(512, 1_024), long_per_second=0.4, short_tokens=32, short_answer=8, short_per_second=1.0,
    long_answer=4, equal_prompts=6, equal_tokens=256, equal_answer=8,
)  # fmt: skip


def prompt(scale: ApartScale, seed: str, tokens: int) -> list[int]:
    """Equal for equal seeds, over all arms."""
    rng = random.Random(seed)
    return [rng.randrange(10, scale.vocabulary) for _ in range(tokens)]


async def warm_up(route: Route, scale: ApartScale, record: Record) -> None:
    """Every engine, every length: kernels are compiled, engines have met, allocators have grown."""
    for number, tokens in enumerate((*scale.lengths, scale.lengths[-1])):
        for turn in range(len(route.decoders)):
            await route.serve(prompt(scale, f"warm {number} {turn}", tokens + 8), 8)
    await asyncio.gather(*(route.serve(prompt(scale, f"warm s{n}", scale.short_tokens), 8) for n in range(8)))
    record.say(f"{route.name}: warm")


async def sweep(route: Route, scale: ApartScale, record: Record) -> None:
    """Single prompts on idle engines: cold, and again where they were decoded (a hit in HBM)."""
    for tokens in (each + 8 for each in scale.lengths):
        before = await counted(route)
        for number in range(scale.prompts):
            for engine in route.engines:
                await engine.calm(2.0)
            words = prompt(scale, f"sweep {tokens} {number}", tokens)
            served = await route.serve(words, _ANSWER_TOKENS)
            hit = await served.decoder.ask(words, _ANSWER_TOKENS)
            facts = {"ttft": served.ttft, "leg": served.prefill_leg, "decode_ttft": served.answer.ttft_seconds}
            record.note("sweep", arm=route.name, tokens=tokens, prompt=number, hbm=hit.ttft_seconds, **facts)
        record.note(
            "sweep_counts", arm=route.name, tokens=tokens, prompts=scale.prompts, **(await since(route, before))
        )
    record.say(f"{route.name}: sweep of {scale.lengths} tokens")


async def beside(route: Route, scale: ApartScale, record: Record) -> None:
    """Single prompts while every decode engine serves a batch of streams: what do the streams feel of them?"""
    async with AsyncExitStack() as stack:
        streams = {each.name: await stack.enter_async_context(_streaming(each, scale)) for each in route.decoders}
        for tokens in (each + 8 for each in scale.lengths):
            for number in range(scale.prompts):
                started = time.perf_counter()
                served = await route.serve(prompt(scale, f"beside {tokens} {number}", tokens), _ANSWER_TOKENS)
                until = started + served.ttft + _AFTER_SECONDS
                await asyncio.sleep(max(0.0, until - time.perf_counter()) + 0.05)
                felt = [worst_gap(seen, started, until) for seen in streams[served.decoder.name]]
                usual = [usual_gap(seen, started) for seen in streams[served.decoder.name]]
                gaps = {"worst_gap": statistics.median(felt), "usual_gap": statistics.median(usual)}
                record.note("beside", arm=route.name, tokens=tokens, prompt=number, ttft=served.ttft, **gaps)
    record.say(f"{route.name}: the same beside {scale.streams} streams")


@asynccontextmanager
async def _streaming(engine: EngineClient, scale: ApartScale) -> AsyncIterator[list[list[float]]]:
    seen: list[list[float]] = [[] for _ in range(scale.streams)]

    async def stream(number: int) -> None:
        words = prompt(scale, f"stream {engine.name} {number}", scale.short_tokens)
        await engine.ask(words, scale.stream_tokens, seen=seen[number])

    tasks = [asyncio.ensure_future(stream(number)) for number in range(scale.streams)]
    try:
        await asyncio.wait(tasks, timeout=_STREAMS_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
        yield seen
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def worst_gap(seen: Sequence[float], since: float, until: float) -> float:
    """Longest silence of a stream that overlaps a window; 0 for one that was over by then."""
    return max((late - early for early, late in pairwise(seen) if late >= since and early <= until), default=0.0)


def usual_gap(seen: Sequence[float], before: float) -> float:
    gaps = [late - early for early, late in pairwise(seen) if before - 1.0 <= early and late < before]
    return statistics.median(gaps) if gaps else 0.0


class Arrival(NamedTuple):
    at: float
    kind: str
    number: int
    tokens: int
    answer: int


def arrivals(scale: ApartScale, seed: int) -> list[Arrival]:
    """Long prompts come as a Poisson process, short ones at a steady rate."""
    return sorted([*_long(scale, random.Random(seed)), *_short(scale)])


def _long(scale: ApartScale, rng: random.Random) -> Iterator[Arrival]:
    at, number = rng.expovariate(scale.long_per_second), 0
    while at < scale.load_seconds:
        yield Arrival(at, "long", number, rng.randint(*scale.long_tokens), scale.long_answer)
        at, number = at + rng.expovariate(scale.long_per_second), number + 1


def _short(scale: ApartScale) -> Iterator[Arrival]:
    for number in range(int(scale.load_seconds * scale.short_per_second)):
        yield Arrival(number / scale.short_per_second, "short", number, scale.short_tokens, scale.short_answer)


async def load(route: Route, scale: ApartScale, seed: int, record: Record) -> None:
    """The same requests at the same times for every arm. Gaps go into the record as counts of tenths of a ms."""
    before, gaps = await counted(route), Counter[int]()
    planned = arrivals(scale, seed)
    prompts = [prompt(scale, f"{route.name} {seed} {each.kind} {each.number}", each.tokens) for each in planned]
    started = time.perf_counter() + 0.2

    async def one(arrival: Arrival, words: list[int]) -> None:
        await asyncio.sleep(max(0.0, started + arrival.at - time.perf_counter()))
        served = await route.serve(words, arrival.answer)
        facts = {"ttft": served.ttft, "leg": served.prefill_leg, "tokens": arrival.tokens, "at": arrival.at}
        record.note("load", arm=route.name, seed=seed, kind=arrival.kind, **facts)
        if arrival.kind == "short":
            gaps.update(round(gap * 10_000) for gap in served.answer.gaps)

    tasks = [asyncio.ensure_future(one(*each)) for each in zip(planned, prompts, strict=True)]
    _, late = await asyncio.wait(tasks, timeout=scale.load_seconds + scale.drain_seconds)
    for task in late:
        task.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    failed = [f"{type(error).__name__}: {error}" for error in done if isinstance(error, BaseException)]
    facts: dict[str, Any] = {"failed": len(failed), "first_error": failed[0][:300] if failed else ""}
    facts |= {"seconds": time.perf_counter() - started, "requests": len(planned), **(await since(route, before))}
    record.note("load_gaps", arm=route.name, seed=seed, tenth_ms={str(gap): gaps[gap] for gap in sorted(gaps)}, **facts)
    record.say(f"{route.name}: load with seed {seed}, {len(planned)} requests, {len(failed)} failed")


async def equal(route: Route, scale: ApartScale, record: Record) -> None:
    """Twice where nothing is handed over: an engine need not agree with itself, cold and on a hit."""
    for turn in range(1 if isinstance(route, Apart) else 2):
        for number in range(scale.equal_prompts):
            words = prompt(scale, f"equal {number}", scale.equal_tokens + 8)
            engine = None if isinstance(route, Apart) else route.engines[0]
            answer = (
                await engine.ask(words, scale.equal_answer)
                if engine
                else (await route.serve(words, scale.equal_answer)).answer
            )
            record.note("equal", arm=route.name, turn=turn, prompt=number, tokens=answer.tokens)
    record.say(f"{route.name}: {scale.equal_prompts} answers to be compared")


async def counted(route: Route) -> Counter[str]:
    total: Counter[str] = Counter()
    for engine in route.engines:
        found = await engine.counters()
        total.update({name: found[name] for name in found if name in COUNTERS or name.startswith(_FAILURES)})
    return total


async def since(route: Route, before: Counter[str]) -> dict[str, float]:
    """vLLM publishes what a step counted with a later one."""
    await asyncio.sleep(0.3)
    now = await counted(route)
    return {name: now[name] - before[name] for name in now if now[name] != before[name]}
