"""Prefixes that only the disk still holds: the rate of their load, and what the gate makes of a load that is too slow.

What each request really loaded, and from where, is read from the engine's counters.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from benchmarks.served.client import EngineClient
from benchmarks.served.record import Record
from benchmarks.served.scale import Scale

_ANSWER_TOKENS = 4
_WRITTEN = "dynamo_kvbm_offloaded_blocks_total/nvme_ssd"
_LOADED = "dynamo_kvbm_hit_blocks_total/"


def make_prompts(scale: Scale) -> list[list[int]]:
    rng = random.Random(2)
    return [[rng.randrange(10, scale.vocabulary) for _ in range(scale.disk.tokens)] for _ in range(scale.disk.prompts)]


async def store(client: EngineClient, scale: Scale, record: Record) -> None:
    """Other prompts have to push these out of DRAM before `load` finds them on the disk alone."""
    for number, prompt in enumerate(make_prompts(scale)):
        for kind in ("cold", "hbm"):
            await _ask(client, prompt, number, kind, record)
        await written(client)


async def load(client: EngineClient, scale: Scale, record: Record) -> None:
    await _ask_again(client, make_prompts(scale), "disk", record)
    record.say(f"disk: {scale.disk.prompts} prompts of {scale.disk.tokens} tokens")


async def gate(client: EngineClient, prompts: Sequence[list[int]], record: Record) -> None:
    """An engine with the gate on, asked for prompts that it computed cold and has since pushed out to its disk."""
    await _ask_again(client, prompts, "gate", record)
    record.say(f"gate: {len(prompts)} prompts")


async def written(client: EngineClient, seconds: float = 30.0) -> None:
    """Waits until blocks stop arriving on the disk. At once on an engine without one."""
    last, waited = 0.0, 0.0
    while (now := (await client.counters())[_WRITTEN]) != last and waited < seconds:
        last, waited = now, waited + 0.5
        await asyncio.sleep(0.5)


async def _ask_again(client: EngineClient, prompts: Sequence[list[int]], kind: str, record: Record) -> None:
    for number, prompt in enumerate(prompts):
        await client.empty_hbm()
        await _ask(client, prompt, number, kind, record)


async def _ask(client: EngineClient, prompt: list[int], number: int, kind: str, record: Record) -> None:
    before = await client.counters()
    answer = await client.ask(prompt, _ANSWER_TOKENS)
    await client.calm()
    after = await client.counters()
    loaded = {tier: after[_LOADED + tier] - before[_LOADED + tier] for tier in ("nvme_ssd", "host_dram")}
    facts = {"ttft": answer.ttft_seconds, "disk_blocks": loaded["nvme_ssd"], "dram_blocks": loaded["host_dram"]}
    record.note("disk", arm=client.name, prompt=number, kind=kind, prompt_tokens=len(prompt), **facts)
