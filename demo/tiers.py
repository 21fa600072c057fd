"""Experiment 1: the same prompts cold, from HBM, and from DRAM after HBM has given them up."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from demo.asking import Answer, client_for, complete
from demo.fleet import HBM_BLOCKS
from tools.server_process import ServerProcess
from tools.vllm_server import BLOCK_TOKENS, CHUNK_TOKENS

PROMPTS = 6
#: Ends four tokens behind a prefill chunk, so that the last chunk has the same shape cold and on a hit.
PROMPT_TOKENS = 16 * CHUNK_TOKENS + 4
FILLERS = HBM_BLOCKS * BLOCK_TOKENS // PROMPT_TOKENS + 2


@dataclass(frozen=True)
class TierResult:
    name: str
    ttft_seconds: float
    answers_equal_cold: bool


def random_prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(10, 500) for _ in range(PROMPT_TOKENS)]


def run(replica: ServerProcess, step: Callable[[], None]) -> list[TierResult]:
    """`step` is called after each of `steps()` requests."""
    client, rng = client_for(replica.url), random.Random(1)

    def ask(tokens: list[int]) -> Answer:
        answer = complete(client, tokens)
        step()
        return answer

    ask(random_prompt(rng))
    prompts = [random_prompt(rng) for _ in range(PROMPTS)]
    cold, hbm = zip(*((ask(tokens), ask(tokens)) for tokens in prompts), strict=True)
    for _ in range(FILLERS):
        ask(random_prompt(rng))
    dram = [ask(tokens) for tokens in prompts]
    expected = [answer.tokens for answer in cold]
    return [
        TierResult(name, statistics.median(a.ttft_seconds for a in answers), [a.tokens for a in answers] == expected)
        for name, answers in (("cold", cold), ("HBM hit", hbm), ("DRAM hit", dram))
    ]


def steps() -> int:
    return 1 + 3 * PROMPTS + FILLERS
