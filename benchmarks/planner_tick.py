"""Cost of one planner tick for a pool of 500 engines, part by part, in CPU time, beside json.dumps of its line.

    python -m benchmarks planner_tick [--engines N]

"decide and record" is what the planner adds to the time it waits for answers: deciding, encoding the log line, metrics.
Reading 500 metrics pages is told apart: it happens while the other pages are on their way. More than 50 ms to decide
and record is exit code 1.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

from dynamo_planner.decision import decide
from dynamo_planner.decision_log import Chain, encode
from dynamo_planner.exposition import parse_engine_metrics
from dynamo_planner.history import sight
from dynamo_planner.metrics import PlannerMetrics
from dynamo_planner.records import (
    DecisionInputs,
    Delta,
    EngineObservation,
    FleetObservation,
    Memory,
    ProxyObservation,
    SizingPolicy,
)

MOST_SECONDS, ROUNDS = 0.050, 30


def fleet(engines: int, tick: int) -> FleetObservation:
    """A busy pool, its load going up and down."""
    load = 1.0 + 0.3 * math.sin(tick / 20)
    seen = tuple(
        EngineObservation(
            f"http://10.0.{number // 250}.{number % 250}:8000",
            "ready",
            age_seconds=999.0,
            interval_seconds=10.0,
            running=20.0 * load + number % 7,
            waiting=float(number % 2),
            kv_usage=0.4 * load,
            prompt_tokens=12_000.0 * load + 100 * number,
            generation_tokens=4_000.0 * load,
            prompt_tokens_total=1e6,
            generation_tokens_total=1e6,
            ttft=Delta(2.0 * load, 10.0 * load, 9.8 * load),
            itl=Delta(80.0 * load, 4_000.0, 3_950.0),
            queue_wait=Delta(0.5, 10.0 * load),
        )
        for number in range(engines)
    )
    proxy = ProxyObservation("", 10.0, engines * 10 * load, engines * 12_000 * load, 0.0, 20 * engines)
    return FleetObservation(10.0 * tick, seen, proxy, wall_seconds=10.0 * tick)


def page(buckets: int = 22, others: int = 500) -> str:
    """A metrics page of about the size of vLLM's."""
    lines = [
        'vllm:num_requests_running{engine="0"} 3',
        'vllm:num_requests_waiting{engine="0"} 0',
        'vllm:kv_cache_usage_perc{engine="0"} 0.4',
        'vllm:prompt_tokens_total{engine="0"} 1000',
        'vllm:generation_tokens_total{engine="0"} 200',
    ]
    for name in ("vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"):
        lines += [f'{name}_bucket{{engine="0",le="{edge / 10}"}} {edge}' for edge in range(1, buckets)]
        lines += [f'{name}_sum{{engine="0"}} 5', f'{name}_count{{engine="0"}} {buckets}']
    lines += [
        f'vllm:another_histogram_{n}_bucket{{engine="0",model_name="some/model",le="{n}"}} {n}' for n in range(others)
    ]
    return "\n".join(lines) + "\n"


def median(times: int, call: Callable[[int], object]) -> float:
    spent = []
    for number in range(times):
        began = time.process_time()
        call(number)
        spent.append(time.process_time() - began)
    return statistics.median(spent)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="planner_tick", description=__doc__)
    parser.add_argument("--engines", type=int, default=500)
    options = parser.parse_args(arguments)
    policy = SizingPolicy("sla", max_replicas=2000, ttft_seconds=0.5, itl_seconds=0.05)
    memory, chain, metrics = Memory(), Chain(), PlannerMetrics("advisory")
    for tick in range(60):
        memory = decide(DecisionInputs(fleet(min(options.engines, 20), tick), policy, memory)).memory
    inputs = DecisionInputs(fleet(options.engines, 61), policy, memory)
    decision = decide(inputs)
    chain.entry(decision)

    def record(number: int) -> str:
        told = replace(decision, inputs=replace(decision.inputs, memory=decision.memory))
        text = encode({"kind": "decision", "decision": chain.entry(told)})
        seen = sight(decision, float(number))
        metrics.decided("default", decision, False)
        metrics.saw("default", seen, decision)
        return text

    deciding, recording = median(ROUNDS, lambda _: decide(inputs)), median(ROUNDS, record)
    plain = json.loads(record(0))
    writing = median(ROUNDS, lambda _: json.dumps(plain))
    text = page()
    reading = median(ROUNDS, lambda _: parse_engine_metrics(text))
    print(f"{options.engines} engines, log line of {len(record(0)) / 1024:.0f} KiB, page of {len(text) / 1024:.0f} KiB")
    print(f"decide              {deciding * 1e3:8.1f} ms")
    print(f"record              {recording * 1e3:8.1f} ms  (json.dumps of the line alone: {writing * 1e3:.1f} ms)")
    print(f"decide and record   {(deciding + recording) * 1e3:8.1f} ms  of {MOST_SECONDS * 1e3:.0f} ms")
    print(f"read {options.engines} pages      {reading * options.engines * 1e3:8.1f} ms  ({reading * 1e3:.2f} ms each)")
    return 0 if deciding + recording <= MOST_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
