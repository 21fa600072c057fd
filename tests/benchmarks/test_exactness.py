"""The comparison of answers, on engines made of arithmetic: equal ones are equal, and one with wrong KV is seen."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.served import exactness
from benchmarks.served.client import Answer
from benchmarks.served.record import Fact, Record, read
from benchmarks.served.scale import TINY

SCALE = dataclasses.replace(TINY, exact=dataclasses.replace(TINY.exact, calm_seconds=0.0))


class Engine:
    """Answers a prompt by its sum. Asked again, an engine with `wrong_kv` is off in every seventh answer's end."""

    def __init__(self, wrong_kv: bool) -> None:
        self.name = "engine"
        self._wrong_kv = wrong_kv
        self._seen: set[int] = set()

    async def ask(self, prompt: Sequence[int], max_tokens: int, logprobs: bool = False) -> Answer:
        await asyncio.sleep(0)
        total = sum(prompt)
        tokens = [(total + index) % 500 for index in range(max_tokens)]
        if self._wrong_kv and total in self._seen and total % 7 == 0:
            tokens[-1] += 1
        self._seen.add(total)
        return Answer(tuple(tokens), tuple(float(token) for token in tokens), 0.0, 0.0)

    async def counters(self) -> Counter[str]:
        return Counter()

    async def calm(self) -> bool:
        return True


def compared(folder: Path, wrong_kv: bool) -> dict[str, Fact]:
    record = Record(folder / "raw.jsonl")
    engines: list[Any] = [Engine(False), Engine(wrong_kv)]
    asyncio.run(exactness.run(engines[0], engines[1], SCALE, record))
    record.close()
    return {fact["what"]: fact for fact in read(folder / "raw.jsonl") if fact["part"] == "exact"}


def test_equal_engines_are_equal_and_the_control_is_not(tmp_path: Path) -> None:
    found = compared(tmp_path, wrong_kv=False)
    control = found.pop("control: one token of the first block changed")
    assert control["same"] == 0
    assert len(found) == 7
    assert all(fact["same"] == fact["prompts"] == SCALE.exact.prompts for fact in found.values())


def test_wrong_kv_is_seen_where_it_is(tmp_path: Path) -> None:
    found = compared(tmp_path, wrong_kv=True)
    damaged = {str(index) for index, prompt in enumerate(exactness.make_prompts(SCALE)) if sum(prompt) % 7 == 0}
    assert damaged
    assert found["first pass, preempted, against cold"]["same"] == SCALE.exact.prompts
    for what in ("reload, preempted, against either hit", "reload, never preempted, against either hit"):
        assert found[what]["differ"] == dict.fromkeys(damaged, SCALE.exact.answer_tokens - 1)
        assert found[what]["first_token_differs"] == 0
    assert found["reload, alone, against the hit alone"]["differ"] == dict.fromkeys(damaged, 1)
