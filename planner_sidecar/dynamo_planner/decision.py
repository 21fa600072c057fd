"""The decision: one frozen record of inputs in, one frozen decision out. Pure, so a log of inputs can be replayed.

Up at once and by as many as needed. Down only after the need has stayed below the current count for the whole
stabilisation window, to the most that was needed in it, but by no more than a share of what is there in a period.
Numbers that are stale can never cause a scale-down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .budget import Wish
from .demand import learn
from .records import DOWN, READY, STARTING, Decision, DecisionInputs, FleetObservation, Memory, SizingPolicy
from .sizing import Need, cleaned, load_needs
from .slo import corrected, sla_needs


@dataclass(frozen=True)
class _Verdict:
    desired: int
    reason: str
    explanation: str


def decide(inputs: DecisionInputs) -> Decision:
    """Decide once. A manual order wins over the rules, stays inside the bounds and restarts the window."""
    fleet, policy = cleaned(inputs.observation), _bounded(inputs)
    now, current = fleet.time_seconds, fleet.current
    memory = learn(inputs.memory, fleet, policy)
    if fleet.is_complete:
        has_fallen = memory.last_count is not None and current < memory.last_count  # what was only said has no pace
        memory = replace(memory, last_count=current, last_down_seconds=now if has_fallen else memory.last_down_seconds)
    if fleet.is_edited:  # somebody's wish: it gets its own window
        memory = replace(memory, since_seconds=now, needs=((now, current),))
    if inputs.order is not None:
        desired = min(max(inputs.order, policy.min_replicas), policy.max_replicas)
        memory = replace(memory, since_seconds=now, needs=((now, desired),))
        said = f"{current} -> {desired} by hand (bounds {policy.min_replicas}..{policy.max_replicas})"
        return Decision(current, desired, "manual", said, desired, desired, inputs, memory)
    stale = sum(engine.state == READY and engine.stale for engine in fleet.engines)
    ready = sum(engine.usable for engine in fleet.engines)
    need = _combined(fleet, policy, memory, stale) if ready else None
    if need is not None and not stale:
        memory = corrected(memory, fleet, policy)
    down = _unseen(fleet, policy, memory) if need is None else current if stale else need.down
    memory = _remembered(memory, now, down, policy.stabilisation_seconds)
    verdict = _verdict(fleet, policy, memory, need, stale)
    up = current if need is None else need.up
    return Decision(current, verdict.desired, verdict.reason, verdict.explanation, up, down, inputs, memory)


def is_blind(decision: Decision) -> bool:
    """Whether it rests on nothing that was seen: no advice, for replicas may run and serve all the same."""
    fleet, policy = cleaned(decision.inputs.observation), decision.inputs.policy
    if not fleet.is_complete or (fleet.proxy is not None and fleet.proxy.stale_reason):
        return True
    if decision.reason in ("manual", "wake") or any(engine.usable for engine in fleet.engines):
        return False
    return decision.reason != "asleep" or not _sleeps(fleet, policy, decision.memory)


def wish(inputs: DecisionInputs) -> Wish:
    """What the pool would have if no budget were shared: the first half of a joint decision."""
    decision = decide(replace(inputs, ceiling=None))
    # What is being drained or is not seen yet holds its GPUs all the same.
    held = max(sum(engine.state != DOWN for engine in inputs.observation.engines), inputs.observation.ordered or 0)
    policy = inputs.policy
    wanted = min(decision.desired, policy.max_replicas) + (held - decision.current)
    return Wish(held, wanted, min(policy.min_replicas, policy.max_replicas), policy.gpus_per_replica)


def _bounded(inputs: DecisionInputs) -> SizingPolicy:
    """The policy with the shared budget's ceiling in place of a maximum above it; what is there may stay."""
    policy, ceiling = inputs.policy, inputs.ceiling
    if ceiling is None or ceiling >= policy.max_replicas:
        return policy
    held = sum(engine.state != DOWN for engine in inputs.observation.engines)
    beside = max(held, inputs.observation.ordered or 0) - inputs.observation.current
    high = max(ceiling - beside, inputs.observation.current, 1)
    if high >= policy.max_replicas:
        return policy
    return replace(policy, max_replicas=high, min_replicas=min(policy.min_replicas, high))


def _combined(fleet: FleetObservation, policy: SizingPolicy, memory: Memory, stale: int) -> Need:
    """The most demanding signal. An engine that cannot be read is presumed to be busy and needed."""
    needs = load_needs(fleet, policy) if policy.target == "load" else sla_needs(fleet, policy, memory)
    first = max(needs, key=lambda need: (need.up, need.down))
    down = max(need.down for need in needs)
    return Need(first.up + stale, max(down, first.up) + stale, first.reason, first.why)


def _remembered(memory: Memory, now: float, down: int, window_seconds: float) -> Memory:
    kept = tuple(entry for entry in memory.needs if now - window_seconds <= entry[0] <= now)
    since = memory.since_seconds
    if since is None or since > now:
        since = now
    return replace(memory, since_seconds=since, needs=(*kept, (now, down)))


def _unseen(fleet: FleetObservation, policy: SizingPolicy, memory: Memory) -> int:
    """What is needed as long as nothing tells: what was, unless nobody wants anything."""
    if _sleeps(fleet, policy, memory):
        return fleet.current
    return max(fleet.current, *(count for _, count in memory.needs), 0)


def _verdict(fleet: FleetObservation, policy: SizingPolicy, memory: Memory, need: Need | None, stale: int) -> _Verdict:
    current, low, high = fleet.current, policy.min_replicas, policy.max_replicas
    if not fleet.is_complete:
        text = "what is there is not known (the proxy or the cluster has not told)"
        return _Verdict(current, "fleet_unknown", f"{text}; holding {current}")
    if policy.idle_to_zero_seconds is not None and need is None and current == 0:
        return _at_zero(fleet, policy, memory)
    if current < low:
        wanted = min(high, max(low, *(count for _, count in memory.needs)))
        more = f"; the window needed {wanted}" if wanted > low else ""
        return _Verdict(wanted, "below_min", f"{current} replicas are fewer than the minimum of {low}{more}")
    if need is None:
        starting = sum(engine.state == STARTING for engine in fleet.engines)
        text = f"{starting} of {len(fleet.engines)} engines start and " if starting else ""
        said = f"{text}none of {len(fleet.engines)} gives fresh numbers; holding {current}"
        return _Verdict(current, "stale" if stale else "no_ready_engine", said)
    if need.up > current:
        if current >= high:
            said = f"{need.why}; {need.up} replicas are needed but the maximum is {high}"
            return _Verdict(current if stale else high, "at_max" if current == high else "above_max", said)
        wanted = min(need.up, high)
        capped = f", capped at the maximum of {high}" if need.up > high else ""
        return _Verdict(wanted, need.reason, f"{need.why}; {need.up} replicas are needed, {current} are there{capped}")
    if stale:
        return _Verdict(current, "stale", f"{stale} of {len(fleet.engines)} engines cannot be read; holding {current}")
    if current > high:
        return _Verdict(high, "above_max", f"{current} replicas are more than the maximum of {high}")
    return _downwards(fleet, policy, memory, need)


def _at_zero(fleet: FleetObservation, policy: SizingPolicy, memory: Memory) -> _Verdict:
    """Asleep: the first request that the proxy sees wakes the pool. A proxy that is away serves nobody: no reason."""
    proxy = fleet.proxy
    if proxy is not None and not proxy.stale_reason and (proxy.arrivals or proxy.in_flight):
        count = min(max(1, policy.min_replicas, *(count for _, count in memory.needs)), policy.max_replicas)
        return _Verdict(count, "wake", f"requests arrive and nothing runs; starting {count}")
    return _Verdict(0, "asleep", "nothing runs and nothing arrives")


def _downwards(fleet: FleetObservation, policy: SizingPolicy, memory: Memory, need: Need) -> _Verdict:
    current, now, window = fleet.current, fleet.time_seconds, policy.stabilisation_seconds
    if _sleeps(fleet, policy, memory):
        return _Verdict(0, "idle_to_zero", f"nothing was asked for {policy.idle_to_zero_seconds:g} s")
    floor = max(max(entry[1] for entry in memory.needs), policy.min_replicas)
    if max(need.down, policy.min_replicas) >= current:
        return _Verdict(current, "steady", f"{need.why}; {current} replicas are right")
    filled = now - (memory.since_seconds if memory.since_seconds is not None else now)
    if floor >= current or filled < window:
        said = f"{need.why}; fewer than {current} would do, but not yet for all of {window:g} s"
        return _Verdict(current, "stabilising", said)
    if any(engine.state == STARTING for engine in fleet.engines):
        # The need that ordered it was counted with it: taken back now, it is ordered again.
        return _Verdict(current, "stabilising", f"{need.why}; what was ordered has not come yet")
    said = f"{need.why}; at most {floor} of {current} replicas were needed in the last {window:g} s"
    last = memory.last_down_seconds
    if last is not None and 0 <= now - last < policy.down_period_seconds:
        period = f"the next may follow after {policy.down_period_seconds:g} s"
        return _Verdict(current, "rate_limited", f"{said}; there were more {now - last:.0f} s ago, {period}")
    step = max(1, math.ceil(current * policy.max_down_share - 1e-9))
    return _Verdict(max(floor, current - step), "idle_window", said)


def _sleeps(fleet: FleetObservation, policy: SizingPolicy, memory: Memory) -> bool:
    patience, asked = policy.idle_to_zero_seconds, memory.last_asked_seconds
    return patience is not None and asked is not None and fleet.time_seconds - asked >= patience
