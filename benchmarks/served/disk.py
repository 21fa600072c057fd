"""A prefix that only the disk still holds: the rate of its load, and what the gate makes of a load that is too slow.

The gate is on, as by default. What each request really loaded is read from the engine's counters.
"""

from __future__ import annotations

import asyncio
import random

from benchmarks.served.client import EngineClient
from benchmarks.served.record import Record
from benchmarks.served.scale import Scale

_ANSWER_TOKENS = 4
_WRITTEN = "dynamo_kvbm_offloaded_blocks_total/nvme_ssd"
_READ = "dynamo_kvbm_hit_blocks_total/nvme_ssd"
_PROMOTED = "dynamo_kvbm_hit_blocks_total/host_dram"


async def run(client: EngineClient, scale: Scale, record: Record) -> None:
    size, rng = scale.disk, random.Random(2)
    prompts = [[rng.randrange(10, scale.vocabulary) for _ in range(size.tokens)] for _ in range(size.prompts)]
    for number, prompt in enumerate(prompts):
        # The second use admits it to the disk, the third finds it in HBM.
        for kind in ("cold", "second", "hbm"):
            await _ask(client, prompt, number, kind, record)
        await _written(client)
    for turn in range(size.rounds):
        for number, prompt in enumerate(prompts):
            await client.empty_hbm()
            await _ask(client, prompt, number, f"disk{turn}", record)
    record.say(f"disk: {size.prompts} prompts of {size.tokens} tokens, {size.rounds} rounds")


async def _ask(client: EngineClient, prompt: list[int], number: int, kind: str, record: Record) -> None:
    before = await client.counters()
    answer = await client.ask(prompt, _ANSWER_TOKENS)
    await client.calm()
    after = await client.counters()
    read, promoted = after[_READ] - before[_READ], after[_PROMOTED] - before[_PROMOTED]
    facts = {"ttft": answer.ttft_seconds, "disk_blocks": read, "dram_blocks": promoted}
    record.note("disk", prompt=number, kind=kind, prompt_tokens=len(prompt), **facts)


async def _written(client: EngineClient, seconds: float = 30.0) -> None:
    """Waits until blocks stop arriving on the disk."""
    last, waited = -1.0, 0.0
    while waited < seconds:
        now = (await client.counters())[_WRITTEN]
        if now == last:
            return
        last, waited = now, waited + 1.0
        await asyncio.sleep(1.0)
