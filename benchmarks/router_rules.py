"""Which rule gives the soonest first token: our policy code and published rules on simulated engines, in virtual time.

    python -m benchmarks router_rules [--trace mooncake_conversation_trace.jsonl] [--requests N] [--quick]

No sockets and no clock: other work on the machine cannot change a figure. The proxies' ledger, index and learning are
the real ones. With several proxies each sees its own requests at once and those of the others 3 ms later, or never.
Without a trace the requests are agentic sessions made here.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from dynamo_proxy.approx_index import ApproxIndex
from dynamo_proxy.learning import CostLearner
from dynamo_proxy.ledger import Counts, Ledger
from dynamo_proxy.policy import CostModel

from benchmarks.routing import rules, traces
from benchmarks.routing.simulated import BLOCK_TOKENS, Running, SimulatedEngine

GOSSIP_SECONDS = 0.003  # two until it is told, one on the way
RULES = (
    "ours",
    "ours, nothing learnt",
    "dynamo",
    "sglang cache_aware",
    "lmetric",
    "llm-d sticky",
    "least loaded",
    "round robin",
)


@dataclass
class Proxy:
    """What one proxy knows."""

    rule: rules.Rule
    learner: CostLearner
    ledger: Ledger = field(default_factory=Ledger)
    index: ApproxIndex = field(default_factory=ApproxIndex)


@dataclass
class Setting:
    engines: int = 8
    capacity_tokens: int = 500_000
    proxies: int = 1
    gossip: bool = True


def new_proxy(name: str, setting: Setting, seed: int) -> Proxy:
    rng, learner = Random(seed), CostLearner()
    made = {
        "ours": lambda: rules.ours(rng, learner),
        "ours, nothing learnt": lambda: rules.ours(rng, CostLearner()),
        "dynamo": lambda: rules.dynamo(rng),
        "sglang cache_aware": lambda: rules.cache_aware(rng),
        "lmetric": rules.lmetric,
        "llm-d sticky": lambda: rules.sticky(CostModel()),
        "least loaded": lambda: rules.least_loaded(rng),
        "round robin": rules.round_robin,
    }[name]()
    proxy = Proxy(made, learner)
    for slot in range(setting.engines):
        proxy.ledger.load(slot)
        # A node of the index is a block of the trace: even numbers are fine nodes, one unit each.
        proxy.index.set_capacity(slot, setting.capacity_tokens // BLOCK_TOKENS)
    return proxy


class Replay:
    """One run: arrivals through proxies to engines."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.setting = setting
        self.proxies = [new_proxy(name, setting, seed) for seed in range(setting.proxies)]
        self.engines = [SimulatedEngine(setting.capacity_tokens) for _ in range(setting.engines)]
        self._queue: list[tuple[float, int, Any]] = []
        self._order = count()
        self.first_token: list[float] = []
        self.token_seconds: list[float] = []
        self.hit_tokens = self.prompt_tokens = 0
        self._open: dict[int, Any] = {}
        self._begun: dict[int, float] = {}

    def at(self, seconds: float, call: Any) -> None:
        heapq.heappush(self._queue, (seconds, next(self._order), call))

    def run(self, arrivals: Sequence[traces.Arrival]) -> dict[str, float]:
        for number, arrival in enumerate(arrivals):
            self.at(arrival.seconds, lambda now, a=arrival, n=number: self._arrive(n, a, now))
        while self._queue:
            now, _, call = heapq.heappop(self._queue)
            call(now)
        for engine in self.engines:
            engine.check()
        ordered = sorted(self.first_token)
        return {
            "hit": self.hit_tokens / self.prompt_tokens,
            "mean": statistics.fmean(ordered),
            "p50": ordered[len(ordered) // 2],
            "p90": ordered[int(len(ordered) * 0.9)],
            "p99": ordered[int(len(ordered) * 0.99)],
            "tpot_ms": statistics.fmean(self.token_seconds) * 1000,
        }

    def _arrive(self, number: int, arrival: traces.Arrival, now: float) -> None:
        proxy = self.proxies[number % len(self.proxies)]
        chain = tuple(2 * block for block in arrival.blocks)
        tokens = arrival.prompt_tokens
        nodes = proxy.index.matched(chain, (1 << self.setting.engines) - 1)
        held = {slot: min(depth * BLOCK_TOKENS, tokens) for slot, depth in nodes.items()}
        loads = [proxy.ledger.load(slot) for slot in range(self.setting.engines)]
        slot = proxy.rule(loads, held, tokens)
        new, queued = tokens - held.get(slot, 0), loads[slot].pending_tokens
        lease = proxy.ledger.charge(slot, new, tokens)
        proxy.index.insert(slot, chain, now)
        self._tell(proxy, slot, now)
        for other in self.proxies:
            if other is not proxy and self.setting.gossip:
                self.at(now + GOSSIP_SECONDS, lambda then, o=other: o.index.insert(slot, chain, then))
        sequence = Running(number, arrival.blocks, tokens, arrival.output_tokens)
        self.prompt_tokens += tokens
        ends = (proxy, lease, now, new, queued)
        self.engines[slot].waiting.append(sequence)
        self._open[number] = ends
        self._step(slot, now)

    def _tell(self, proxy: Proxy, slot: int, now: float) -> None:
        if len(self.proxies) == 1 or not self.setting.gossip:
            return
        own, name = proxy.ledger.own(slot), str(self.proxies.index(proxy))

        def hear(then: float, own: Counts = own) -> None:
            for other in self.proxies:
                if other is not proxy:
                    other.ledger.told(name, slot, own)

        self.at(now + GOSSIP_SECONDS, hear)

    def _step(self, slot: int, now: float) -> None:
        engine = self.engines[slot]
        if engine.busy:
            return
        seconds = engine.begin_step()
        if seconds is not None:
            self.at(now + seconds, lambda then: self._stepped(slot, then))

    def _stepped(self, slot: int, now: float) -> None:
        first, done = self.engines[slot].end_step()
        for sequence in first:
            proxy, lease, placed, new, queued = self._open[sequence.number]
            seconds = proxy.learner.model.prefill_seconds(new, sequence.prompt_tokens)
            proxy.ledger.prefilled(lease, seconds)
            proxy.learner.first_token(now - placed, queued, new, sequence.prompt_tokens)
            self._tell(proxy, slot, now)
            self.first_token.append(now - placed)
            self.hit_tokens += sequence.hit_tokens
            self._begun[sequence.number] = now
        for sequence in done:
            proxy, lease, *_ = self._open.pop(sequence.number)
            seconds, load = now - self._begun.pop(sequence.number), proxy.ledger.load(slot)
            beside = proxy.ledger.seconds_beside(lease)
            proxy.learner.stream_ended(seconds, sequence.output_tokens, load, beside)
            if sequence.output_tokens > 1:
                self.token_seconds.append(seconds / (sequence.output_tokens - 1))
            proxy.ledger.release(lease)
            self._tell(proxy, slot, now)
        self._step(slot, now)


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}\n")
    print("| rule | hit | TTFT mean s | p50 | p90 | p99 | TPOT ms |\n|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['hit']:.3f} | {row['mean']:.3f} | {row['p50']:.2f} | {row['p90']:.2f} "
              f"| {row['p99']:.1f} | {row['tpot_ms']:.1f} |", flush=True)  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks router_rules")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--requests", type=int, default=3400)
    parser.add_argument("--quick", action="store_true", help="one setting instead of all")
    options = parser.parse_args(arguments)

    def arrivals(load: float) -> list[traces.Arrival]:
        if options.trace is None:
            return traces.agentic(options.requests, load)
        return traces.read_mooncake(options.trace, options.requests, load)

    what = options.trace.name if options.trace is not None else "agentic sessions"
    everyone = arrivals(1.0)
    show(f"{what}, 8 engines, load 1", {name: Replay(name, Setting()).run(everyone) for name in RULES})
    if options.quick:
        return 0
    for engines, load in ((4, 0.5), (16, 2.0), (32, 4.0), (8, 0.3), (8, 1.4)):
        requests = arrivals(load)
        rows = {name: Replay(name, Setting(engines)).run(requests) for name in RULES[:6]}
        show(f"{what}, {engines} engines, load {load:g}", rows)
    rows = {}
    for proxies, gossip in ((1, True), (2, True), (4, True), (4, False)):
        label = f"ours, {proxies} proxies" + ("" if gossip else ", each alone")
        rows[label] = Replay("ours", Setting(proxies=proxies, gossip=gossip)).run(everyone)
    show(f"{what}, 8 engines, load 1, several proxies", rows)
    return 0
