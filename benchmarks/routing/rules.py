"""Published routing rules in our own words, to be replayed beside ours: loads and cached tokens in, a slot out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random

from dynamo_proxy import policy
from dynamo_proxy.learning import CostLearner

Rule = Callable[[Sequence[policy.Load], Mapping[int, int], int], int]


def ours(rng: Random, learner: CostLearner) -> Rule:
    return lambda loads, held, tokens: policy.choose_kv(loads, held, tokens, learner.model, rng).slot


def dynamo(rng: Random) -> Rule:
    rule = policy.OverlapRule(1.0, 0.0, 16)
    return lambda loads, held, tokens: policy.choose_overlap(loads, held, tokens, rule, rng).slot


def least_loaded(rng: Random) -> Rule:
    return lambda loads, held, tokens: policy.choose_least_loaded(loads, held, tokens, rng).slot


def round_robin() -> Rule:
    last = [-1]

    def choose(loads: Sequence[policy.Load], held: Mapping[int, int], tokens: int) -> int:
        last[0] = policy.choose_round_robin(loads, held, tokens, last[0]).slot
        return last[0]

    return choose


def cache_aware(rng: Random) -> Rule:
    """SGLang's router: the longest prefix, unless requests lie too unevenly or too little of the prompt is known."""

    def choose(loads: Sequence[policy.Load], held: Mapping[int, int], tokens: int) -> int:
        most, fewest = max(load.in_flight for load in loads), min(load.in_flight for load in loads)
        longest = max(held.values(), default=0)
        if (most - fewest > 64 and most > 1.5 * fewest) or longest <= 0.3 * tokens:
            return rng.choice([load.slot for load in loads if load.in_flight == fewest])
        return max(loads, key=lambda load: held.get(load.slot, 0)).slot

    return choose


def lmetric() -> Rule:
    """Waiting and new prefill tokens, times requests in flight."""

    def choose(loads: Sequence[policy.Load], held: Mapping[int, int], tokens: int) -> int:
        def score(load: policy.Load) -> float:
            return (load.pending_tokens + tokens - min(held.get(load.slot, 0), tokens) + 1) * (load.in_flight + 1)

        return min(loads, key=score).slot

    return choose


def sticky(model: policy.CostModel) -> Rule:
    """llm-d: engines that hold most of the prompt, while that costs at most 5 s; then the fewest uncached tokens."""

    def choose(loads: Sequence[policy.Load], held: Mapping[int, int], tokens: int) -> int:
        def waits(load: policy.Load) -> float:
            return model.t_p * (load.pending_tokens + tokens - min(held.get(load.slot, 0), tokens))

        near = [load for load in loads if held.get(load.slot, 0) >= 0.8 * tokens]
        best = min(map(waits, loads))
        near = [load for load in near if waits(load) - best <= 5.0]
        return min(near or loads, key=waits).slot

    return choose
