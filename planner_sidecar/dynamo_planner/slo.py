"""How many replicas the `sla` rule wants: TTFT from a queue at the forecast demand, ITL from the batch. Pure.

Each need carries both directions: `up` at the target, `down` at the demand over a margin. Both are corrected by
what was observed: a target that is missed in fact asks for more, whatever the model says.
"""

from __future__ import annotations

import math
from dataclasses import replace

from .capacity import DecodeLoad, PrefillLoad, batch_at, itl_at, prefill_service, replicas_for_decode
from .capacity import replicas_for_prefill as prefill_replicas
from .demand import Demand, demand, pending
from .queueing import MAX_UTILISATION
from .records import STARTING, Delta, FleetObservation, Memory, SizingPolicy
from .sizing import Need
from .step_model import coefficients

_BACKLOG_SECONDS = 30.0
_MIN_VERDICT = 20.0  # samples below which lateness may be chance
_CORRECTION = (0.5, 2.0)
_KEEP_MARGIN = 0.9  # of a count that is kept: the demand's bound is a margin already, this one only damps


def sla_needs(fleet: FleetObservation, policy: SizingPolicy, memory: Memory) -> list[Need]:
    """One need per target that the pool's role answers for."""
    needs = []
    if policy.ttft_seconds is not None and policy.role != "decode":
        needs.append(_ttft_need(fleet, policy, memory))
    if policy.itl_seconds is not None and policy.role != "prefill":
        needs.append(_itl_need(fleet, policy, memory))
    return needs or [Need(1, 1, "no_target", "no target concerns this pool")]


def corrected(memory: Memory, fleet: FleetObservation, policy: SizingPolicy) -> Memory:
    """Move the slow factor: up while requests are late though the model saw enough replicas, down while they are on
    time though it wanted more, else back towards one.
    """
    load, fitted = _prefill_load(memory, memory.arrival_rate or 0.0, policy), coefficients(memory.prefill)
    late = late_share(_total(fleet, "ttft"))
    if policy.ttft_seconds is None or fitted is None or load is None or late is None:
        return memory
    ready = sum(engine.usable for engine in fleet.engines)
    promised = prefill_replicas(fitted, load, policy.ttft_seconds, policy.attainment, policy.is_pooled) <= ready
    on_time = late <= 1.0 - policy.attainment
    factor = memory.correction
    if promised and not on_time and not _settling(fleet, policy):
        factor *= 1.03
    elif on_time and not promised:
        factor *= 0.99
    else:
        factor += 0.002 * (1.0 - factor)
    return replace(memory, correction=min(max(factor, _CORRECTION[0]), _CORRECTION[1]))


def late_share(total: Delta | None) -> float | None:
    """Share of the samples beyond the target, or None while too few were seen to judge."""
    if total is None or total.within is None or total.count < _MIN_VERDICT:
        return None
    return max(0.0, 1.0 - total.within / total.count)


def attained(fleet: FleetObservation) -> float | None:
    """Share of first tokens, and of gaps, within their targets: the worse of the two; None if nothing was judged."""
    shares = []
    for what in ("ttft", "itl"):
        total = _total(fleet, what)
        if total is not None and total.within is not None and total.count > 0:
            shares.append(min(1.0, total.within / total.count))
    return min(shares) if shares else None


def _prefill_load(memory: Memory, rate: float, policy: SizingPolicy) -> PrefillLoad | None:
    tokens, means = memory.prompt_tokens, memory.prefill.mean_features
    if tokens is None and means is not None:
        tokens = means[1]
    return None if tokens is None else PrefillLoad(rate, tokens, policy.prompt_cv2, memory.correction)


def _ttft_need(fleet: FleetObservation, policy: SizingPolicy, memory: Memory) -> Need:
    target = policy.ttft_seconds or 0.0
    ready = sum(engine.usable for engine in fleet.engines)
    waiting = sum(engine.waiting or 0.0 for engine in fleet.engines if engine.usable)
    wanted, total = demand(memory, fleet, policy), _total(fleet, "ttft")
    if (memory.arrival_rate or 0.0) <= 1e-6 and wanted.upper <= 1e-6 and waiting == 0:
        return Need(1, 1, "ttft", "no arrivals")
    observed = _observed_need(fleet, policy, total, target)
    fitted, load = coefficients(memory.prefill), _prefill_load(memory, wanted.upper, policy)
    if fitted is None or load is None:
        seen = (
            "none seen yet" if total is None or not total.count else f"{total.sum_seconds / total.count * 1e3:.0f} ms"
        )
        return Need(observed, max(observed, ready), "ttft", f"prefill rate still unknown, TTFT {seen}")
    service = prefill_service(fitted, load)
    up = prefill_replicas(fitted, load, target, policy.attainment, policy.is_pooled)
    backlog = max(
        _backlog_at_help(fleet, wanted, waiting, service.mean_seconds), _pending_at_help(fleet, policy, memory, wanted)
    )
    if backlog > ready:
        up = max(up, math.ceil((wanted.now + backlog / _BACKLOG_SECONDS) * service.mean_seconds - 1e-9))
    insured = math.ceil(wanted.insured * service.mean_seconds / MAX_UTILISATION - 1e-9)
    reason = "burst" if insured > max(up, observed) else "ttft"
    up = max(up, observed, insured)
    spare = replace(load, rate=wanted.upper / _KEEP_MARGIN)
    down = max(up, prefill_replicas(fitted, spare, target, policy.attainment, policy.is_pooled))
    ahead = f"{wanted.upper:.2f} requests/s within {wanted.horizon_seconds:.0f} s (now {wanted.now:.2f})"
    cost = f"take {service.mean_seconds * 1e3:.0f} ms each against a TTFT of {target * 1e3:.0f} ms"
    room = f"; room for {wanted.insured:.2f} at once" if wanted.insured else ""
    return Need(up, down, reason, f"{ahead} of {load.tokens:.0f} tokens {cost} for {policy.attainment:.0%}{room}")


def _backlog_at_help(fleet: FleetObservation, wanted: Demand, waiting: float, seconds_each: float) -> float:
    """Requests that will wait when what is ordered now has come: more arrive until then than all that are there or on
    their way can serve. It must be gone within `_BACKLOG_SECONDS`, or every later request is late as well.
    """
    served = fleet.current / seconds_each if seconds_each > 0 else math.inf
    return waiting + max(0.0, wanted.certain - served) * wanted.horizon_seconds


def _itl_need(fleet: FleetObservation, policy: SizingPolicy, memory: Memory) -> Need:
    target, total = policy.itl_seconds or 0.0, _total(fleet, "itl")
    running = sum(engine.running or 0.0 for engine in fleet.engines if engine.usable)
    ready = max(1, sum(engine.usable for engine in fleet.engines))
    wanted, tokens = demand(memory, fleet, policy), memory.output_tokens
    backlog = _pending_at_help(fleet, policy, memory, wanted) if policy.role == "decode" else 0.0
    upper = max(wanted.upper, wanted.insured, wanted.now + backlog / _BACKLOG_SECONDS if backlog > ready else 0.0)
    rate = upper * tokens if tokens is not None else 0.0
    if (total is None or not total.count or running == 0) and rate <= 1e-6:
        return Need(1, 1, "itl", "no decoding")
    observed = _observed_need(fleet, policy, total, target)
    fitted = coefficients(memory.decode)
    if fitted is None:
        return Need(observed, max(observed, ready), "itl", "decode time still unknown")
    load = DecodeLoad(rate, memory.kv_per_request or 0.0, policy.max_kv_usage, policy.max_running_per_replica)
    # What runs now must fit too: output lengths may have grown since they were learnt.
    stuck = _replicas_for_batch(fitted, load, running, target)
    modelled = replicas_for_decode(fitted, load, target)
    spare = replace(load, tokens_per_second=rate / _KEEP_MARGIN)
    keep = replicas_for_decode(fitted, spare, target)
    if modelled is None or keep is None:
        # No batch is small enough: more replicas would not help, fewer are not known to hurt less.
        return Need(observed, max(observed, ready), "itl", f"ITL of {target * 1e3:.1f} ms is out of reach at any batch")
    batch = batch_at(fitted, load, max(modelled, 1))
    why = f"{rate:.0f} tokens/s in batches of {batch:.1f} take {itl_at(fitted, load, batch) * 1e3:.1f} ms a token"
    need = Need(max(modelled, observed), max(keep, stuck, observed), "itl", f"{why} against {target * 1e3:.1f} ms")
    return replace(need, down=max(need.up, need.down))


def _pending_at_help(fleet: FleetObservation, policy: SizingPolicy, memory: Memory, wanted: Demand) -> float:
    """What waits, and what will wait when what is ordered now has come if it grows on as in the last interval; while
    help is on its way nobody knows how long it will.
    """
    is_helped = fleet.current > sum(engine.usable for engine in fleet.engines)
    return pending(fleet, policy) + (0.0 if is_helped else memory.pending_growth * wanted.horizon_seconds)


def _replicas_for_batch(fitted: tuple[float, ...], load: DecodeLoad, running: float, target: float) -> int:
    """Replicas over which the requests running now could spread and stay within the target."""
    fixed, slope = fitted[0], fitted[1] + fitted[2] * load.kv_per_request
    if running <= 0 or fixed >= target:
        return 1
    return max(1, math.ceil(slope * running / (target - fixed) - 1e-9))


def _observed_need(fleet: FleetObservation, policy: SizingPolicy, total: Delta | None, target: float) -> int:
    """A missed target asks for proportionally more, twice at most, but not again while help is on its way."""
    if total is None or total.count <= 0:
        return 1
    mean, late = total.sum_seconds / total.count, late_share(total)
    allowed = 1.0 - policy.attainment
    ratio = mean / target
    if late is not None and late > allowed + 2.0 * math.sqrt(allowed * policy.attainment / total.count):
        ratio = max(ratio, 1.1)
    if ratio <= 1.0:
        return 1
    ready = sum(engine.usable for engine in fleet.engines)
    return max(1, fleet.current if _settling(fleet, policy) else math.ceil(ready * min(2.0, ratio) - 1e-9))


def _settling(fleet: FleetObservation, policy: SizingPolicy) -> bool:
    return any(
        engine.state == STARTING or (engine.usable and engine.age_seconds < policy.warmup_seconds)
        for engine in fleet.engines
    )


def _total(fleet: FleetObservation, what: str) -> Delta | None:
    """All usable engines' growth as one; `within` only if every engine that counted samples knows it."""
    deltas = [engine.ttft if what == "ttft" else engine.itl for engine in fleet.engines if engine.usable]
    found = [delta for delta in deltas if delta is not None]
    if not found:
        return None
    known = [delta.within for delta in found if delta.count > 0 and delta.within is not None]
    judged = len(known) == sum(delta.count > 0 for delta in found)
    within = sum(known) if judged else None
    return Delta(sum(delta.sum_seconds for delta in found), sum(delta.count for delta in found), within)
