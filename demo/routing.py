"""Experiment 2: the same multi-turn chats through the proxy, round-robin against KV-aware, in alternation."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from demo.asking import chat, client_for
from demo.fleet import Fleet

#: Each mode goes first once, so that neither profits from a machine that warms up or tires.
ORDER = ("round-robin", "kv", "kv", "round-robin")
USERS, TURNS, AT_ONCE = 6, 4, 2
WORDS_PER_TURN, ANSWER_TOKENS = 90, 16
_LETTERS = "aeiourstnlbcdfgh"


@dataclass(frozen=True)
class RoutingResult:
    mode: str
    hit_rate: float
    ttft_mean_seconds: float
    ttft_p90_seconds: float
    requests: int


def run(fleet: Fleet, step: Callable[[], None]) -> list[RoutingResult]:
    ttft: dict[str, list[float]] = {mode: [] for mode in ORDER}
    hits: dict[str, list[float]] = {mode: [] for mode in ORDER}
    for number, mode in enumerate(ORDER):
        fleet.set_router_mode(mode)
        before = _hit_counters(fleet)
        ttft[mode] += _chats(fleet.proxy_url, seed=100 + number, step=step)
        hits[mode].append(_hit_rate(before, _hit_counters(fleet)))
    return [
        RoutingResult(
            mode,
            statistics.mean(hits[mode]),
            statistics.mean(ttft[mode]),
            statistics.quantiles(ttft[mode], n=10)[-1],
            len(ttft[mode]),
        )
        for mode in dict.fromkeys(ORDER)
    ]


def steps() -> int:
    return len(ORDER) * USERS * TURNS


def _chats(url: str, seed: int, step: Callable[[], None]) -> list[float]:
    """Every user talks turn after turn; `AT_ONCE` of them at the same time. Fresh words for each seed: nothing is
    cached from an earlier round."""
    system = _words(random.Random(seed), WORDS_PER_TURN)

    def user(number: int) -> list[float]:
        rng = random.Random(f"{seed}/{number}")
        client = client_for(url)
        messages: list[Any] = [{"role": "system", "content": system}]
        ttft = []
        for _ in range(TURNS):
            messages.append({"role": "user", "content": _words(rng, WORDS_PER_TURN)})
            answer = chat(client, messages, ANSWER_TOKENS)
            messages.append({"role": "assistant", "content": answer.text})
            ttft.append(answer.ttft_seconds)
            step()
        return ttft

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [seconds for each in pool.map(user, range(USERS)) for seconds in each]


def _words(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices(_LETTERS, k=rng.randrange(3, 8))) for _ in range(count))


def _hit_counters(fleet: Fleet) -> tuple[float, float]:
    """Prompt tokens, and those of them that came from a cache (HBM or a tier below)."""
    cached = fleet.metric("vllm:prefix_cache_hits_total") + fleet.metric("vllm:external_prefix_cache_hits_total")
    return fleet.metric("vllm:prefix_cache_queries_total"), cached


def _hit_rate(before: tuple[float, float], after: tuple[float, float]) -> float:
    return (after[1] - before[1]) / max(1.0, after[0] - before[0])
