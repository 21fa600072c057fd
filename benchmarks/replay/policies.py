"""Policies for Dynamo's replay: the planner's own decision code, an oracle that has read the trace, a schedule."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynamo_planner.capacity import DecodeLoad, PrefillLoad, replicas_for_decode, replicas_for_prefill
from dynamo_planner.decision import decide
from dynamo_planner.profile_file import Profile, models
from dynamo_planner.records import (
    DecisionInputs,
    Delta,
    EngineObservation,
    FleetObservation,
    Memory,
    ProxyObservation,
    SizingPolicy,
)
from dynamo_planner.step_model import coefficients, learn_steps

Tick = dict[str, Any]
INTERVAL_SECONDS, STARTUP_SECONDS = 10.0, 90.0
KV_TOKENS = 14_000 * 64
_SLOT_SECONDS = 30.0


@dataclass(frozen=True)
class Aim:
    """What the planner and the oracle are asked for, and how long the planner's window is."""

    ttft_seconds: float
    itl_seconds: float
    attainment: float
    burst_factor: float = 1.0
    window_seconds: float = STARTUP_SECONDS + INTERVAL_SECONDS  # idle at most what a start too many would cost


class Planned:
    """`decide` for both pools. What the sidecar reads from /metrics comes here from the replay's own counters; step
    times from the profile that Dynamo's SLA modes are given too, and from per-step records.
    """

    def __init__(self, profile: Profile, aim: Aim, least: tuple[int, int] = (1, 1)) -> None:
        common = SizingPolicy(
            target="sla",
            max_replicas=64,
            ttft_seconds=aim.ttft_seconds,
            itl_seconds=aim.itl_seconds,
            attainment=aim.attainment,
            burst_factor=aim.burst_factor,
            startup_seconds=STARTUP_SECONDS,
            interval_seconds=INTERVAL_SECONDS,
            stabilisation_seconds=aim.window_seconds,
            max_kv_usage=0.9,
            max_running_per_replica=256.0,
        )
        self.policies = {
            role: replace(common, role=role, min_replicas=few)
            for role, few in zip(("prefill", "decode"), least, strict=True)
        }
        prefill, decode = models(profile)
        self.memories = {"prefill": Memory(prefill=prefill), "decode": Memory(decode=decode)}
        self.log: list[tuple[float, str, int, int, str]] = []
        self._now = 0.0

    def initial_tick_ms(self) -> float:
        self._now = INTERVAL_SECONDS
        return self._now * 1e3

    def on_tick(self, seen: Tick) -> Tick:
        targets = {role: self._decide(role, seen) for role in ("prefill", "decode")}
        self._now += INTERVAL_SECONDS
        return {f"target_{role}": count for role, count in targets.items()} | {"next_tick_ms": self._now * 1e3}

    def _decide(self, role: str, seen: Tick) -> int | None:
        memory = self._taught(role, seen)
        decision = decide(DecisionInputs(self._fleet(role, seen), self.policies[role], memory))
        self.memories[role] = decision.memory
        self.log.append((self._now, role, decision.current, decision.desired, decision.reason))
        return decision.desired if decision.direction != "hold" else None

    def _taught(self, role: str, seen: Tick) -> Memory:
        memory, samples = self.memories[role], []
        for step in seen.get(f"{role}_fpm_snapshots", []):
            if role == "prefill" and step["sum_prefill_tokens"] > 0:
                samples.append(((1.0, float(step["sum_prefill_tokens"])), step["wall_time"]))
            if role == "decode" and step["num_decode_requests"] > 0:
                kv = step["sum_decode_kv_tokens"] / KV_TOKENS
                samples.append(((1.0, float(step["num_decode_requests"]), kv), step["wall_time"]))
        if role == "prefill":
            return replace(memory, prefill=learn_steps(memory.prefill, samples))
        return replace(memory, decode=learn_steps(memory.decode, samples))

    def _fleet(self, role: str, seen: Tick) -> FleetObservation:
        traffic = seen.get("traffic") or {}
        count, prompt = float(traffic.get("num_req") or 0), float(traffic.get("avg_isl") or 0)
        output = float(traffic.get("avg_osl") or 0)
        ready = int(seen[f"active_{role}_count"])
        total = int(seen.get(f"non_draining_{role}_count", ready))
        ready = min(ready, total)
        steps = seen.get(f"{role}_fpm_snapshots", [])
        waiting = sum(step[f"num_queued_{role}"] for step in steps)
        running = sum(step["num_decode_requests"] for step in steps) if role == "decode" else 0.0
        kv = sum(step["sum_decode_kv_tokens"] for step in steps) / KV_TOKENS if role == "decode" else 0.0
        share = max(1, ready)
        engines = [
            EngineObservation(
                f"{role}{number}",
                "ready" if number < ready else "starting",
                age_seconds=999.0,
                interval_seconds=INTERVAL_SECONDS,
                running=running / share,
                waiting=waiting / share,
                kv_usage=kv / share,
                generation_tokens=count * output / share,
                ttft=Delta(0.0, count / share),
            )
            for number in range(total)
        ]
        upstream = {  # in flight is what waits and what is inside; a prefilled prompt "decodes" until it has left
            step["worker_id"]: step["num_queued_prefill"] + step["num_prefill_requests"] + step["num_decode_requests"]
            for step in seen.get("prefill_fpm_snapshots", [])
        }
        proxy = ProxyObservation(
            interval_seconds=INTERVAL_SECONDS,
            arrivals=count,
            prompt_tokens=count * prompt,
            in_flight=int(running + (waiting if role == "decode" else 0) + sum(upstream.values())),
        )
        return FleetObservation(self._now, tuple(engines), proxy, ordered=total)


class Scheduled:
    """Replica counts by time: (seconds, prefill, decode), in order."""

    def __init__(self, plan: Sequence[tuple[float, int, int]]) -> None:
        self._plan = list(plan)
        self._now = 0.0

    def initial_tick_ms(self) -> float:
        self._now = INTERVAL_SECONDS
        return self._now * 1e3

    def on_tick(self, seen: Tick) -> Tick:
        current = [entry for entry in self._plan if entry[0] <= self._now] or self._plan[:1]
        self._now += INTERVAL_SECONDS
        targets: Tick = {"next_tick_ms": self._now * 1e3}
        for role, count in zip(("prefill", "decode"), current[-1][1:], strict=True):
            there = int(seen.get(f"non_draining_{role}_count", seen[f"active_{role}_count"]))
            targets[f"target_{role}"] = count if count != there else None
        return targets


def oracle(trace: Path, fitted: Planned, aim: Aim) -> Scheduled:
    """The least that the same capacity model needs for the rates that will really come, ordered a start-up ahead.

    The step times are those that an earlier run has learnt.
    """
    return _told(_needs(trace, fitted, aim, 1.0), range(-1, 1 + math.ceil(STARTUP_SECONDS / _SLOT_SECONDS)))


def hindsight(trace: Path, fitted: Planned, aim: Aim, room: float) -> Scheduled:
    """What can be done without seeing ahead: the oracle's counts for the true rates of the last start-up time, with the
    room above them that is best for this stream, which only hindsight tells.
    """
    return _told(_needs(trace, fitted, aim, room), range(-1 - math.ceil(STARTUP_SECONDS / _SLOT_SECONDS), 0))


def _needs(trace: Path, fitted: Planned, aim: Aim, room: float) -> dict[int, tuple[int, int]]:
    """Replicas for `room` times what came in each slot."""
    prefill, decode = coefficients(fitted.memories["prefill"].prefill), coefficients(fitted.memories["decode"].decode)
    assert prefill is not None, "run the planner before the oracle: it lends its step times"
    assert decode is not None, "run the planner before the oracle: it lends its step times"
    sums: dict[int, list[float]] = {}
    with trace.open() as lines:
        for line in lines:
            entry = json.loads(line)
            slot = sums.setdefault(int(entry["timestamp"] / 1e3 / _SLOT_SECONDS), [0.0, 0.0, 0.0])
            for place, value in enumerate((1.0, entry["input_length"], entry["output_length"])):
                slot[place] += value
    needs = {}
    kv = fitted.memories["decode"].kv_per_request or 0.0
    for slot, (count, prompts, outputs) in sums.items():
        load = PrefillLoad(room * count / _SLOT_SECONDS, prompts / count, fitted.policies["prefill"].prompt_cv2)
        tokens = DecodeLoad(room * outputs / _SLOT_SECONDS, kv, 0.9, 256.0)
        few = replicas_for_prefill(prefill, load, aim.ttft_seconds, aim.attainment, False)
        needs[slot] = few, replicas_for_decode(decode, tokens, aim.itl_seconds) or 1
    return needs


def _told(needs: dict[int, tuple[int, int]], offsets: range) -> Scheduled:
    """In each slot the most that is needed in the slots at these offsets from it."""
    plan = []
    for slot in range(max(needs) + 1):
        places = {max(slot + offset, min(needs)) for offset in offsets}
        seen = [needs[place] for place in places if place in needs] or [(1, 1)]
        plan.append((slot * _SLOT_SECONDS, max(few for few, _ in seen), max(many for _, many in seen)))
    return Scheduled(plan)
