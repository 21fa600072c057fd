"""Which engine takes a request: pure functions over plain numbers. No I/O, clock, event loop or engine names.

The default rule is predicted time to first token plus externality (seconds, the smallest wins):

    own   = t_p*n + t_a*n*(L - n/2)                  this prompt's uncached prefill there
    cost  = t_p*pending                              the queue ahead of it
          + own * (1 + gamma + alpha*in_flight)      itself, cache pollution, the delay it imposes on others
          + ceil((pending + n)/chunk) * step         decode steps between its prefill chunks
          + beta*E[out]*(t_d*in_flight + t_k*active) slower decoding for it there
    step  = t_0 + t_d*in_flight + t_k*active

alpha, gamma and beta come from replayed traces; t_* and E[out] are learnt (learning.py), and a t_p that was wrong by a
factor of two never cost more than 2 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import final


@dataclass(frozen=True, slots=True)
class CostModel:
    """Coefficients of the cost rule. t_* are seconds (per token, per token pair, per sequence, per cached
    token).
    """

    t_p: float = 1e-4
    t_a: float = 0.0
    t_0: float = 0.01
    t_d: float = 1e-4
    t_k: float = 3e-8
    alpha: float = 0.3
    gamma: float = 1.0
    beta: float = 0.3
    chunk_tokens: int = 8192
    expected_output_tokens: float = 300.0

    def prefill_seconds(self, new_tokens: int, prompt_tokens: int) -> float:
        """Time to prefill the uncached tail of a prompt."""
        return (self.t_p + self.t_a * (prompt_tokens - new_tokens / 2)) * new_tokens


@dataclass(slots=True)
class Load:
    """One engine as the rules see it: its number, requests, tokens waiting for prefill, tokens of all requests in
    flight.
    """

    slot: int
    in_flight: int = 0
    pending_tokens: int = 0
    active_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TierWeights:
    """What a block below HBM is worth, of one in HBM."""

    host: float = 0.75
    disk: float = 0.25
    object_store: float = 0.25


@dataclass(frozen=True, slots=True)
class OverlapRule:
    """The settings of Dynamo's rule."""

    weight: float = 1.0
    temperature: float = 0.0
    block_tokens: int = 16


@dataclass(frozen=True, slots=True)
class PrefillRule:
    """When another engine computes a prompt: what a decode engine computes itself, and how many tokens may wait at the
    prefill engine (-1: as long as the prompt is computed sooner there).
    """

    min_tokens: int = 4096  # see config.Routing
    max_queued_tokens: int = -1


Held = dict[int, int]  # slot -> tokens of the prompt that its caches hold; nothing for an engine with none


@final
class Decision:
    """The engine chosen, why, and with which numbers."""

    __slots__ = ("cost_seconds", "matched_tokens", "new_tokens", "reason", "slot")

    def __init__(self, slot: int, reason: str, matched_tokens: int, new_tokens: int, cost_seconds: float) -> None:
        self.slot = slot
        self.reason = reason
        self.matched_tokens = matched_tokens
        self.new_tokens = new_tokens
        self.cost_seconds = cost_seconds


def costs_seconds(loads: Sequence[Load], held: Held, prompt_tokens: int, model: CostModel) -> list[float]:
    """The cost of each engine, in seconds (one loop: it runs for every engine at every request)."""
    t_p, t_a, t_0, t_d, t_k = model.t_p, model.t_a, model.t_0, model.t_d, model.t_k
    shared, alpha, chunk = 1 + model.gamma, model.alpha, model.chunk_tokens
    slower = model.beta * model.expected_output_tokens
    whole = (t_p + t_a * prompt_tokens / 2) * prompt_tokens  # nothing of it is cached
    costs = []
    for load in loads:
        in_flight, pending = load.in_flight, load.pending_tokens
        new, own = prompt_tokens, whole
        if held and (matched := held.get(load.slot, 0)):
            new = prompt_tokens - matched if matched < prompt_tokens else 0
            own = (t_p + t_a * (prompt_tokens - new / 2)) * new
        decode = t_d * in_flight + t_k * load.active_tokens
        chunks = (pending + new - 1) // chunk + 1
        costs.append(t_p * pending + own * (shared + alpha * in_flight) + chunks * (t_0 + decode) + slower * decode)
    return costs


def choose_kv(
    loads: Sequence[Load], held: Held, prompt_tokens: int, model: CostModel, rng: Random, temperature: float = 0.0
) -> Decision:
    """The engine of least cost; ties fall at random. With a temperature, a draw that prefers low costs."""
    costs = costs_seconds(loads, held, prompt_tokens, model)
    index, least, is_tied = 0, costs[0], False
    for place, cost in enumerate(costs):
        if cost < least:
            index, least, is_tied = place, cost, False
        elif cost == least and place:
            is_tied = True
    if temperature or is_tied:
        index = sample(costs, temperature, rng)
    winner = loads[index]
    longest = max(held.values()) if held else 0
    if len(loads) == 1:
        reason = "only"
    elif longest and held.get(winner.slot, 0) < longest:
        reason = "load_over_prefix"
    else:
        reason = "prefix" if longest else "load"
    return _decision(winner, held, prompt_tokens, reason, costs[index])


def choose_round_robin(loads: Sequence[Load], held: Held, prompt_tokens: int, last_slot: int) -> Decision:
    """The first engine after `last_slot`, in slot order."""
    ordered = sorted(loads, key=lambda load: load.slot)
    winner = next((load for load in ordered if load.slot > last_slot), ordered[0])
    return _decision(winner, held, prompt_tokens, "round_robin", 0.0)


def choose_random(loads: Sequence[Load], held: Held, prompt_tokens: int, rng: Random) -> Decision:
    return _decision(rng.choice(loads), held, prompt_tokens, "random", 0.0)


def choose_least_loaded(loads: Sequence[Load], held: Held, prompt_tokens: int, rng: Random) -> Decision:
    """The fewest requests in flight, then the fewest tokens waiting for prefill; ties fall at random."""
    least = min((load.in_flight, load.pending_tokens) for load in loads)
    tied = [load for load in loads if (load.in_flight, load.pending_tokens) == least]
    return _decision(rng.choice(tied), held, prompt_tokens, "least_loaded", 0.0)


def choose_overlap(loads: Sequence[Load], held: Held, prompt_tokens: int, rule: OverlapRule, rng: Random) -> Decision:
    """NVIDIA Dynamo's rule: weighted blocks to prefill (those waiting and the prompt's) plus blocks in use."""
    block = rule.block_tokens
    costs = []
    for load in loads:
        new = prompt_tokens - min(held.get(load.slot, 0), prompt_tokens)
        costs.append(rule.weight * (load.pending_tokens + new) / block + load.active_tokens / block)
    index = sample(costs, rule.temperature, rng)
    return _decision(loads[index], held, prompt_tokens, "overlap", costs[index])


def sample(costs: Sequence[float], temperature: float, rng: Random) -> int:
    """The index of the least cost, ties at random; with a temperature a softmax draw over costs scaled to 0..1."""
    least, most = min(costs), max(costs)
    if temperature <= 0 or most <= least:
        return rng.choice([index for index, cost in enumerate(costs) if cost == least])
    weights = [math.exp((least - cost) / (most - least) / temperature) for cost in costs]
    return rng.choices(range(len(costs)), weights)[0]


def is_sooner_elsewhere(here: Load, new_here: int, there: Load, new_there: int, tokens: int, model: CostModel) -> bool:
    """True if an engine that only has to wait computes a prompt sooner `there` than `here`, where it delays others too.

    `new_*` are the prompt's tokens that each lacks.
    """
    own = model.prefill_seconds(new_here, tokens) * (1 + model.alpha * here.in_flight)
    elsewhere = model.prefill_seconds(new_there, tokens) + model.t_p * there.pending_tokens
    return elsewhere <= own + model.t_p * here.pending_tokens


def in_time(
    loads: Sequence[Load], held: Held, prompt_tokens: int, model: CostModel, ttft_seconds: float
) -> Sequence[Load]:
    """The engines that are expected to give a first token in time; if none is, the soonest alone."""
    expected = []
    for load in loads:
        new = prompt_tokens - min(held.get(load.slot, 0), prompt_tokens)
        step = model.t_0 + model.t_d * load.in_flight + model.t_k * load.active_tokens
        chunks = (load.pending_tokens + new - 1) // model.chunk_tokens + 1
        queue = model.t_p * load.pending_tokens
        expected.append(queue + model.prefill_seconds(new, prompt_tokens) + chunks * step)
    soon = [load for load, seconds in zip(loads, expected, strict=True) if seconds <= ttft_seconds]
    return soon or [loads[expected.index(min(expected))]]


def warm_up_limit(mean_in_flight: float, age_seconds: float, warm_up_seconds: float) -> float:
    """Requests that a new engine may have beside others that have so many on average."""
    return max(1.0, mean_in_flight * age_seconds / warm_up_seconds)


def credited_blocks(runs: tuple[int, int, int, int], weights: TierWeights) -> float:
    """Blocks that count as cached, of leading runs down to G1, G2, G3 and G4: what lies lower must be loaded first."""
    g1, g2, g3, g4 = runs
    return g1 + weights.host * (g2 - g1) + weights.disk * (g3 - g2) + weights.object_store * (g4 - g3)


def _decision(winner: Load, held: Held, prompt_tokens: int, reason: str, cost: float) -> Decision:
    matched = min(held.get(winner.slot, 0), prompt_tokens) if held else 0
    return Decision(winner.slot, reason, matched, prompt_tokens - matched, cost)
