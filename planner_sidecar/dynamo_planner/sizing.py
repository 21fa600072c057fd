"""How many replicas the observed work needs. Pure: numbers in, numbers out.

Two needs per signal: `up` at the operator's threshold, `down` with a margin below it, so that a fleet
that has just
shrunk does not have to grow again. Rates, not stocks, are the demand of the `sla` rule (reference:
llm-d#1500).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .records import EngineObservation, FleetObservation, LineStats, Memory, SizingPolicy

_FORGET = 0.98  # weight kept per sample: a line remembers about its last 50 samples
_ARRIVAL_MEMORY_SECONDS = 60.0
_MAX_UTILISATION = 0.92  # beyond it an M/G/1 queue is longer than any estimate of its parameters is good
_SERVICE_SPREAD = 1.6  # squared coefficient of variation of prefill times on production prompt lengths
_BACKLOG_SECONDS = 30.0
_MIN_SAMPLES = 5.0
_ABSURD = 1e15


@dataclass(frozen=True)
class Need:
    """Replicas that one signal asks for, the word for it and a clause with the numbers."""

    up: int
    down: int
    reason: str
    why: str


def cleaned(fleet: FleetObservation) -> FleetObservation:
    """The same fleet, with engines whose numbers are not finite, negative or absurd marked as stale."""
    engines = tuple(
        engine if _sane(engine) else replace(engine, stale_reason="absurd_numbers") for engine in fleet.engines
    )
    proxy = fleet.proxy
    if proxy is not None and not _in_range(proxy.interval_seconds, proxy.arrivals, proxy.prompt_tokens):
        proxy = replace(proxy, stale_reason="absurd_numbers")
    return replace(fleet, engines=engines, proxy=proxy)


def _sane(engine: EngineObservation) -> bool:
    histograms = [delta for delta in (engine.ttft, engine.itl, engine.queue_wait) if delta is not None]
    return _in_range(
        engine.age_seconds,
        engine.interval_seconds,
        engine.running,
        engine.waiting,
        engine.kv_usage,
        engine.prompt_tokens,
        engine.generation_tokens,
        *(number for delta in histograms for number in (delta.sum_seconds, delta.count)),
    )


def _in_range(*numbers: float | None) -> bool:
    return all(number is None or 0 <= number <= _ABSURD for number in numbers)


def load_needs(fleet: FleetObservation, policy: SizingPolicy) -> list[Need]:
    """KV use, queue and running requests against per-replica thresholds."""
    engines = [engine for engine in fleet.engines if engine.usable]
    running = sum(engine.running or 0.0 for engine in engines)
    waiting = sum(engine.waiting or 0.0 for engine in engines)
    needs = [_queue_need(engines, running, waiting, policy)]
    kv = [engine.kv_usage for engine in engines if engine.kv_usage is not None]
    if kv:
        up, down = _share(sum(kv), policy.max_kv_usage, policy.down_margin)
        why = f"KV use {sum(kv) / len(kv):.0%} on {len(kv)} engines against {policy.max_kv_usage:.0%}"
        needs.append(Need(up, down, "kv_pressure", why))
    if policy.max_running_per_replica is not None:
        up, down = _share(running, policy.max_running_per_replica, policy.down_margin)
        why = f"{running:g} running against {policy.max_running_per_replica:g} per replica"
        needs.append(Need(up, down, "running", why))
    return needs


def sla_needs(fleet: FleetObservation, policy: SizingPolicy, memory: Memory) -> list[Need]:
    """TTFT from an M/G/1 queue per replica, ITL from the line over the batch, both corrected by what was
    observed.
    """
    needs = []
    if policy.ttft_seconds is not None:
        needs.append(_ttft_need(fleet, policy, memory))
    if policy.itl_seconds is not None:
        needs.append(_itl_need(fleet, policy, memory))
    return needs


def learn(memory: Memory, fleet: FleetObservation, policy: SizingPolicy) -> Memory:
    """Fold one observation into the fitted lines and the arrival rate. Cold engines teach nothing
    (dynamo#12430).
    """
    prefill, decode = memory.prefill, memory.decode
    for engine in fleet.engines:
        if not engine.usable or engine.age_seconds < policy.warmup_seconds:
            continue
        first, tokens = engine.ttft, engine.prompt_tokens
        if first is not None and first.mean_seconds is not None and tokens:
            queued = engine.queue_wait.mean_seconds if engine.queue_wait is not None else None
            service = max(first.mean_seconds - (queued or 0.0), 0.05 * first.mean_seconds)
            prefill = add_sample(prefill, tokens / first.count, service)
        gap = engine.itl.mean_seconds if engine.itl is not None else None
        if gap is not None and engine.running:
            decode = add_sample(decode, engine.running, gap)
    return replace(memory, prefill=prefill, decode=decode, arrival_rate=_smoothed_rate(memory, fleet))


def add_sample(stats: LineStats, x: float, y: float) -> LineStats:
    """One more point; points that are not finite change nothing."""
    if not (math.isfinite(x) and math.isfinite(y)):
        return stats
    return LineStats(
        weight=stats.weight * _FORGET + 1.0,
        x=stats.x * _FORGET + x,
        y=stats.y * _FORGET + y,
        xx=stats.xx * _FORGET + x * x,
        xy=stats.xy * _FORGET + x * y,
    )


def fit_line(stats: LineStats) -> tuple[float, float] | None:
    """(a, b) of y = a + b*x with a, b >= 0, or None before there are enough points.

    Points without spread in x give the line through the origin, which over-states the growth with x: the
    safe side.
    """
    if stats.weight < _MIN_SAMPLES or stats.x <= 0:
        return None
    mean_x, mean_y = stats.x / stats.weight, stats.y / stats.weight
    variance = stats.xx / stats.weight - mean_x * mean_x
    if variance <= 1e-3 * mean_x * mean_x:
        return 0.0, mean_y / mean_x
    slope = (stats.xy / stats.weight - mean_x * mean_y) / variance
    slope = min(max(slope, 0.0), mean_y / mean_x)
    return mean_y - slope * mean_x, slope


def waiting_exceeds(rate: float, service_seconds: float, limit_seconds: float) -> float:
    """Probability that a request waits longer than `limit_seconds` in one M/G/1 queue at `rate`
    requests/s.
    """
    utilisation = rate * service_seconds
    if utilisation >= 1.0:
        return 1.0
    if service_seconds <= 0 or utilisation <= 0:
        return 0.0
    decay = 2.0 * (1.0 - utilisation) / (service_seconds * (1.0 + _SERVICE_SPREAD))
    return utilisation * math.exp(-decay * max(0.0, limit_seconds))


def replicas_for_ttft(rate: float, service_seconds: float, policy: SizingPolicy) -> int:
    """Smallest count whose queues meet the TTFT target; a target below the bare service time only bounds
    the load.
    """
    target = policy.ttft_seconds if policy.ttft_seconds is not None else math.inf
    budget = max(target - service_seconds, service_seconds)
    for count in range(1, policy.max_replicas + 1):
        share = rate / count
        if share * service_seconds > _MAX_UTILISATION:
            continue
        if waiting_exceeds(share, service_seconds, budget) <= 1.0 - policy.attainment:
            return count
    return policy.max_replicas


def _share(total: float, limit: float, margin: float) -> tuple[int, int]:
    return max(1, math.ceil(total / limit - 1e-9)), max(1, math.ceil(total / (limit * margin) - 1e-9))


def _queue_need(engines: list[EngineObservation], running: float, waiting: float, policy: SizingPolicy) -> Need:
    """An engine that queues shows how many requests it can run at once; the rest of the queue needs more
    of them.
    """
    count = max(1, len(engines))
    why = f"{waiting:g} waiting and {running:g} running on {len(engines)} engines"
    full = [engine.running or 0.0 for engine in engines if engine.waiting]
    ceiling = sum(full) / len(full) if full else 0.0
    wanted = math.ceil((running + waiting) / ceiling - 1e-9) if ceiling >= 1 else count + 1
    wanted = max(wanted, count + 1)
    up = wanted if waiting > policy.max_waiting_per_replica * count else 1
    down = wanted if waiting > policy.max_waiting_per_replica * policy.down_margin * count else 1
    if waiting > 0:
        down = max(down, count)  # while anything queues, nothing is given up
    return Need(up, down, "queue", why)


def _ttft_need(fleet: FleetObservation, policy: SizingPolicy, memory: Memory) -> Need:
    target = policy.ttft_seconds or 0.0
    ready = sum(engine.usable for engine in fleet.engines)
    rate, tokens = memory.arrival_rate or 0.0, prompt_tokens_per_request(fleet)
    line = fit_line(memory.prefill)
    waiting = sum(engine.waiting or 0.0 for engine in fleet.engines if engine.usable)
    observed = _mean(fleet, "ttft")
    if rate <= 1e-6 and waiting == 0:
        return Need(1, 1, "ttft", "no arrivals")
    if line is None:
        up = _corrected(fleet, policy, observed, target)
        seen = "none seen yet" if observed is None else f"{observed * 1e3:.0f} ms"
        return Need(up, max(up, ready), "ttft", f"prefill rate still unknown, TTFT {seen}")
    if tokens is None:
        tokens = memory.prefill.x / memory.prefill.weight
    service = line[0] + line[1] * tokens
    backlog = rate * service + waiting * service / _BACKLOG_SECONDS
    up = max(replicas_for_ttft(rate, service, policy), math.ceil(backlog) if waiting > ready else 1)
    up = max(up, _corrected(fleet, policy, observed, target))
    down = max(up, replicas_for_ttft(rate / policy.down_margin, service, policy))
    cost = f"take {service * 1e3:.0f} ms each against a TTFT of {target * 1e3:.0f} ms"
    why = f"{rate:.2f} requests/s of {tokens:.0f} tokens {cost}"
    return Need(up, down, "ttft", why)


def _itl_need(fleet: FleetObservation, policy: SizingPolicy, memory: Memory) -> Need:
    target = policy.itl_seconds or 0.0
    observed, line = _mean(fleet, "itl"), fit_line(memory.decode)
    running = sum(engine.running or 0.0 for engine in fleet.engines if engine.usable)
    ready = max(1, sum(engine.usable for engine in fleet.engines))
    if observed is None or running == 0:
        return Need(1, 1, "itl", "no decoding")
    up = _corrected(fleet, policy, observed, target)
    down = max(up, _replicas_for_itl(line, running, target * policy.down_margin, ready))
    why = f"ITL {observed * 1e3:.1f} ms at batch {running / ready:.1f} against {target * 1e3:.1f} ms"
    return Need(up, down, "itl", why)


def _replicas_for_itl(line: tuple[float, float] | None, running: float, limit: float, ready: int) -> int:
    if line is None:
        return ready
    fixed, slope = line
    if fixed >= limit:  # no batch is small enough: more replicas would not help, fewer are not known to hurt less
        return ready
    return max(1, math.ceil(slope * running / (limit - fixed) - 1e-9))


def _corrected(fleet: FleetObservation, policy: SizingPolicy, observed: float | None, target: float) -> int:
    """A missed target asks for proportionally more, twice at most, but not again while help is on its way."""
    if observed is None or observed <= target:
        return 1
    settling = any(
        engine.state == "starting" or (engine.usable and engine.age_seconds < policy.warmup_seconds)
        for engine in fleet.engines
    )
    ready = sum(engine.usable for engine in fleet.engines)
    return max(1, fleet.current if settling else math.ceil(ready * min(2.0, observed / target)))


def _mean(fleet: FleetObservation, what: str) -> float | None:
    seconds = count = 0.0
    for engine in fleet.engines:
        delta = engine.ttft if what == "ttft" else engine.itl
        if engine.usable and delta is not None:
            seconds, count = seconds + delta.sum_seconds, count + delta.count
    return seconds / count if count > 0 else None


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
    """Mean prompt length in the last interval, or None if no request was seen."""
    proxy = fleet.proxy
    if proxy is not None and not proxy.stale_reason and proxy.arrivals and proxy.prompt_tokens:
        return proxy.prompt_tokens / proxy.arrivals
    tokens = sum(engine.prompt_tokens or 0.0 for engine in fleet.engines if engine.usable and engine.ttft)
    count = sum(engine.ttft.count for engine in fleet.engines if engine.usable and engine.ttft)
    return tokens / count if tokens > 0 and count > 0 else None


def _smoothed_rate(memory: Memory, fleet: FleetObservation) -> float | None:
    """Quick up, slow down: a burst counts at once, a pause must last to count."""
    rate, old = arrival_rate(fleet), memory.arrival_rate
    if rate is None or old is None:
        return old if rate is None else rate
    interval = max((engine.interval_seconds for engine in fleet.engines), default=0.0)
    if fleet.proxy is not None:
        interval = max(interval, fleet.proxy.interval_seconds)
    keep = math.exp(-interval / _ARRIVAL_MEMORY_SECONDS)
    return max(rate, keep * old + (1.0 - keep) * rate)
