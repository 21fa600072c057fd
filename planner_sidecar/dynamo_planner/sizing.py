"""How many replicas the `load` rule wants, and what counts as a number at all. Pure: numbers in, numbers out.

Two needs per signal: `up` at the operator's threshold, `down` with a margin below it, so that a fleet that has just
shrunk does not have to grow again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .records import EngineObservation, FleetObservation, SizingPolicy

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
    engines = fleet.engines
    if not all(map(_sane, engines)):
        engines = tuple(e if _sane(e) else replace(e, stale_reason="absurd_numbers") for e in engines)
    proxy = fleet.proxy
    if proxy is not None and not _in_range(
        proxy.interval_seconds, proxy.arrivals, proxy.prompt_tokens, proxy.matched_tokens
    ):
        proxy = replace(proxy, stale_reason="absurd_numbers")
    return replace(fleet, engines=engines, proxy=proxy)


def _sane(engine: EngineObservation) -> bool:
    for delta in (engine.ttft, engine.itl, engine.queue_wait):
        if delta is not None and not _in_range(delta.sum_seconds, delta.count, delta.within):
            return False
    return _in_range(
        engine.age_seconds,
        engine.interval_seconds,
        engine.running,
        engine.waiting,
        engine.kv_usage,
        engine.prompt_tokens,
        engine.generation_tokens,
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
