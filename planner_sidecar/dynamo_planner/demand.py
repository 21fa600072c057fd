"""What one observation teaches: rates, lengths, step times, start-up times and the forecast. Pure.

Rates, not stocks, are the demand of the `sla` rule: a KV share says nothing about what was turned away (llm-d#1500).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .forecast import ForecastRule, fold, outlook
from .records import READY, STARTING, EngineObservation, FleetObservation, Memory, SizingPolicy
from .step_model import learn_steps

_ARRIVAL_MEMORY_SECONDS = 60.0
_LENGTH_MEMORY_SECONDS = 300.0
_STEP_SECONDS = 30.0  # of the forecast's grid: shorter ones are Poisson noise, which the queue model holds already
_STARTUPS = 8
_USUAL_SECONDS = 1800.0  # in which the usual rate moves by a factor of e at most: minutes of a burst move it little
_FIRST_SECONDS = 60.0  # of which it is the plain mean


@dataclass(frozen=True)
class Demand:
    """Requests per second to size for: `upper` holds at the horizon with the promised probability, `certain` is what
    arrives now and is no chance, `insured` what may come from one moment to the next and must find room.
    """

    now: float
    upper: float
    horizon_seconds: float
    certain: float = 0.0
    insured: float = 0.0


def learn(memory: Memory, fleet: FleetObservation, policy: SizingPolicy) -> Memory:
    """Fold one observation in. Cold engines teach nothing about step times (dynamo#12430)."""
    now = fleet.time_seconds
    rate, interval = arrival_rate(fleet), _interval(fleet)
    forecast = memory.forecast
    if rate is not None and interval > 0:
        wall = now if fleet.wall_seconds is None else fleet.wall_seconds
        forecast = fold(forecast, forecast_rule(memory, policy), rate, interval, wall)
    memory = _learn_steps(_learn_startups(memory, fleet), fleet, policy)
    asked = memory.last_asked_seconds
    if asked is None or asked > now or _is_asked(fleet, rate):
        asked = now
    usual, seconds = _usual_rate(memory, rate, interval)
    waiting = pending(fleet, policy)
    return replace(
        memory,
        pending=waiting,
        pending_growth=_growth(memory.pending, waiting, interval),
        usual_rate=usual,
        usual_seconds=seconds,
        forecast=forecast,
        arrival_rate=_smoothed_rate(memory, rate, interval),
        prompt_tokens=_blend(memory.prompt_tokens, prompt_tokens_per_request(fleet), interval),
        output_tokens=_blend(memory.output_tokens, _output_tokens_per_request(fleet), interval),
        kv_per_request=_blend(memory.kv_per_request, _kv_per_request(fleet), interval),
        last_asked_seconds=asked,
    )


def demand(memory: Memory, fleet: FleetObservation, policy: SizingPolicy) -> Demand:
    """The upper forecast, or a burst that is there already and is no chance: two deviations of a Poisson count."""
    now, interval = arrival_rate(fleet), _interval(fleet)
    smoothed = memory.arrival_rate or 0.0
    seen = outlook(memory.forecast, forecast_rule(memory, policy))
    upper = smoothed if seen is None else seen.upper
    certain = max(0.0, now - 2.0 * math.sqrt(now / interval)) if now is not None and interval > 0 else 0.0
    upper = max(upper, certain)
    insured = policy.burst_factor * (memory.usual_rate or 0.0) if policy.burst_factor > 1.0 else 0.0
    return Demand(smoothed if now is None else now, upper, horizon_seconds(memory, policy), certain, insured)


def pending(fleet: FleetObservation, policy: SizingPolicy) -> float:
    """What queues at the pool's engines; for decoders also what waits for its prefill, for it comes as soon as that
    pool has caught up.
    """
    engines, proxy = [engine for engine in fleet.engines if engine.usable], fleet.proxy
    waiting = sum(engine.waiting or 0.0 for engine in engines)
    if policy.role != "decode" or proxy is None or proxy.stale_reason:
        return waiting
    return max(waiting, proxy.in_flight - sum(engine.running or 0.0 for engine in engines))


def horizon_seconds(memory: Memory, policy: SizingPolicy) -> float:
    """From a decision to its effect: the longest of the last start-ups and one tick."""
    startup = max(memory.startups) if memory.startups else policy.startup_seconds
    return startup + policy.interval_seconds


def forecast_rule(memory: Memory, policy: SizingPolicy) -> ForecastRule:
    step = max(_STEP_SECONDS, policy.interval_seconds)
    return ForecastRule(
        step_seconds=step,
        horizon_steps=max(1, math.ceil(horizon_seconds(memory, policy) / step)),
        daily=policy.has_daily_profile,
    )


def arrival_rate(fleet: FleetObservation) -> float | None:
    """Requests per second in the last interval: the proxy's arrivals, else the engines' first tokens."""
    proxy = fleet.proxy
    if proxy is not None and not proxy.stale_reason and proxy.arrivals is not None and proxy.interval_seconds > 0:
        return proxy.arrivals / proxy.interval_seconds
    rates = [
        engine.ttft.count / engine.interval_seconds
        for engine in fleet.engines
        if engine.usable and engine.ttft is not None and engine.interval_seconds > 0
    ]
    return sum(rates) if rates else None


def prompt_tokens_per_request(fleet: FleetObservation) -> float | None:
    """Mean prompt length to compute in the last interval, prefix hits taken off, or None if no request was seen."""
    proxy = fleet.proxy
    if proxy is not None and not proxy.stale_reason and proxy.arrivals and proxy.prompt_tokens:
        cached = min(proxy.matched_tokens or 0.0, 0.99 * proxy.prompt_tokens)
        return (proxy.prompt_tokens - cached) / proxy.arrivals
    return _per_first_token(fleet, [engine.prompt_tokens for engine in fleet.engines])


def _output_tokens_per_request(fleet: FleetObservation) -> float | None:
    return _per_first_token(fleet, [engine.generation_tokens for engine in fleet.engines])


def _per_first_token(fleet: FleetObservation, numbers: list[float | None]) -> float | None:
    total = count = 0.0
    for engine, number in zip(fleet.engines, numbers, strict=True):
        if engine.usable and engine.ttft is not None:
            total, count = total + (number or 0.0), count + engine.ttft.count
    return total / count if total > 0 and count > 0 else None


def _kv_per_request(fleet: FleetObservation) -> float | None:
    usage = running = 0.0
    for engine in fleet.engines:
        if engine.usable and engine.kv_usage is not None and engine.running:
            usage, running = usage + engine.kv_usage, running + engine.running
    return usage / running if running > 0 else None


def _learn_steps(memory: Memory, fleet: FleetObservation, policy: SizingPolicy) -> Memory:
    prefills, decodes = [], []
    for engine in fleet.engines:
        if not engine.usable or engine.age_seconds < policy.warmup_seconds:
            continue
        service = prefill_seconds(engine)
        if service is not None and engine.ttft is not None and engine.prompt_tokens:
            prefills.append(((1.0, engine.prompt_tokens / engine.ttft.count), service))
        gap = engine.itl.mean_seconds if engine.itl is not None else None
        if gap is not None and engine.running:
            decodes.append(((1.0, engine.running, engine.kv_usage or 0.0), gap))
    return replace(memory, prefill=learn_steps(memory.prefill, prefills), decode=learn_steps(memory.decode, decodes))


def prefill_seconds(engine: EngineObservation) -> float | None:
    """Mean time of a prefill alone: to the first token, less the wait in the queue."""
    first = engine.ttft.mean_seconds if engine.ttft is not None else None
    if first is None:
        return None
    queued = engine.queue_wait.mean_seconds if engine.queue_wait is not None else None
    return max(first - (queued or 0.0), 0.05 * first)


def _learn_startups(memory: Memory, fleet: FleetObservation) -> Memory:
    since = dict(memory.starting)
    now, starting = fleet.time_seconds, []
    startups = (*memory.startups, *fleet.startups)[-_STARTUPS:]
    for engine in fleet.engines:
        if engine.state == STARTING:
            starting.append((engine.url, min(since.get(engine.url, now), now)))
        elif engine.state == READY and fleet.ordered is None and now > since.get(engine.url, now):
            startups = (*startups, now - since[engine.url])[-_STARTUPS:]
    return replace(memory, starting=tuple(starting), startups=startups)


def _is_asked(fleet: FleetObservation, rate: float | None) -> bool:
    """Whether anybody wants anything; what cannot be read may."""
    if fleet.proxy is not None and (fleet.proxy.stale_reason or fleet.proxy.in_flight > 0):
        return True
    busy = any(engine.stale or (engine.running or 0) + (engine.waiting or 0) > 0 for engine in fleet.engines)
    return busy or rate is None or rate > 0


def _interval(fleet: FleetObservation) -> float:
    if fleet.proxy is not None and not fleet.proxy.stale_reason and fleet.proxy.interval_seconds > 0:
        return fleet.proxy.interval_seconds
    return max((engine.interval_seconds for engine in fleet.engines if engine.usable), default=0.0)


def _blend(old: float | None, new: float | None, interval: float) -> float | None:
    if new is None or old is None:
        return old if new is None else new
    keep = math.exp(-interval / _LENGTH_MEMORY_SECONDS)
    return keep * old + (1.0 - keep) * new


def _usual_rate(memory: Memory, rate: float | None, interval: float) -> tuple[float | None, float]:
    """What half of the time is passed: it steps up or down, whatever the distance. No rate at all teaches nothing."""
    old, seconds = memory.usual_rate, memory.usual_seconds
    if not rate or interval <= 0:
        return old, seconds
    if old is None or seconds < _FIRST_SECONDS:
        old = rate if old is None else old
        return old + interval / (seconds + interval) * (rate - old), seconds + interval
    step = math.exp(min(interval / _USUAL_SECONDS, 1.0))
    return (min(rate, old * step) if rate > old else max(rate, old / step)), seconds + interval


def _growth(old: float | None, new: float, interval: float) -> float:
    """Per second, as far as it is no chance: beyond two deviations of a count."""
    if old is None or interval <= 0:
        return 0.0
    return max(0.0, new - old - 2.0 * math.sqrt(max(new, 0.0))) / interval


def _smoothed_rate(memory: Memory, rate: float | None, interval: float) -> float | None:
    """Quick up, slow down: a burst counts at once, a pause must last to count."""
    old = memory.arrival_rate
    if rate is None or old is None:
        return old if rate is None else rate
    keep = math.exp(-interval / _ARRIVAL_MEMORY_SECONDS)
    return max(rate, keep * old + (1.0 - keep) * rate)
