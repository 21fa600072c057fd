"""What one replica can carry, from its step-time models: replicas for a prefill rate and for a token rate. Pure.

The planner and the simulator run this same code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .queueing import Service, servers_for
from .step_model import predict


@dataclass(frozen=True)
class PrefillLoad:
    """Prompts to compute: requests/s, tokens each, and the squared coefficient of variation of their lengths."""

    rate: float
    tokens: float
    cv2: float
    correction: float = 1.0


@dataclass(frozen=True)
class DecodeLoad:
    """Tokens to generate per second, the KV share that a running request holds, and what one replica may hold."""

    tokens_per_second: float
    kv_per_request: float = 0.0
    max_kv_usage: float = 0.9
    max_running: float | None = None


def prefill_service(fitted: Sequence[float], load: PrefillLoad) -> Service:
    """Only what grows with the length spreads with it: the fixed part of a step is the same for every prompt."""
    mean = predict(fitted, (1.0, load.tokens))
    varying = 1.0 - fitted[0] / mean if mean > 0 else 1.0
    return Service(load.correction * mean, load.cv2 * varying * varying)


def replicas_for_prefill(
    fitted: Sequence[float], load: PrefillLoad, target_seconds: float, attainment: float, pooled: bool
) -> int:
    """Replicas whose queues keep `attainment` of the requests within the target."""
    return servers_for(load.rate, prefill_service(fitted, load), target_seconds, attainment, pooled)


def batch_at(fitted: Sequence[float], load: DecodeLoad, replicas: int) -> float:
    """Requests that run at once on each replica: Little's law, step time linear in the batch; inf: overloaded."""
    share = load.tokens_per_second / replicas
    slope = fitted[1] + fitted[2] * load.kv_per_request
    if share * slope >= 1.0:
        return math.inf
    return share * fitted[0] / (1.0 - share * slope)


def itl_at(fitted: Sequence[float], load: DecodeLoad, batch: float) -> float:
    return predict(fitted, (1.0, batch, load.kv_per_request * batch))


def replicas_for_decode(fitted: Sequence[float], load: DecodeLoad, target_seconds: float) -> int | None:
    """Replicas whose batch, two deviations up, meets the inter-token target and fits the KV; None: no count does."""
    if load.tokens_per_second <= 0:
        return 1
    if itl_at(fitted, load, 1.0) > target_seconds:
        return None

    def good(count: int) -> bool:
        batch = batch_at(fitted, load, count)
        if not math.isfinite(batch):
            return False
        batch += 2.0 * math.sqrt(batch)
        if batch <= 1.0:
            return True
        fits = load.kv_per_request * batch <= load.max_kv_usage
        runs = load.max_running is None or batch <= load.max_running
        return fits and runs and itl_at(fitted, load, batch) <= target_seconds

    low, high = 1, 1
    while not good(high):
        if high > 1 << 20:
            return None
        low, high = high + 1, high * 2
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle + 1, high)
    return high
