"""Which rule gives the soonest first token: our policy code and published rules on simulated engines, in virtual time.

    python -m benchmarks router_rules [--trace conversation.jsonl] [--requests N] [--quick | --peers | --proxies]

No sockets and no clock: other work on the machine cannot change a figure. The proxies' ledger, index and learning are
the real ones. With several proxies each sees its own requests at once and those of the others 3 ms later, or never.
Without a trace the requests are agentic sessions made here. --peers: engines that read what others have computed.
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
from dynamo_proxy.hints import Reach, gains
from dynamo_proxy.learning import CostLearner
from dynamo_proxy.ledger import Counts, Ledger
from dynamo_proxy.policy import CostModel

from benchmarks.routing import rules, traces
from benchmarks.routing.simulated import BLOCK_TOKENS, T_A, T_P, Running, SimulatedEngine

GOSSIP_SECONDS = 0.003  # two until it is told, one on the way
SEEDS = range(0, 80, 10)
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
    fetch_seconds: float = 0.0  # of a token that an engine reads from another one; 0: they do not
    peer_worth: float = 0.0  # of such a token, until it is learnt


def new_proxy(name: str, setting: Setting, seed: int) -> Proxy:
    rng, learner = Random(seed), CostLearner()
    if setting.peer_worth:
        learner.expect_of_peers(setting.peer_worth)
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

    def __init__(self, name: str, setting: Setting, seed: int = 0) -> None:
        self.setting = setting
        self.proxies = [new_proxy(name, setting, seed + number) for number in range(setting.proxies)]
        self.engines = [SimulatedEngine(setting.capacity_tokens) for _ in range(setting.engines)]
        self._queue: list[tuple[float, int, Any]] = []
        self._order = count()
        self.first_token: list[float] = []
        self.token_seconds: list[float] = []
        self.hit_tokens = self.prompt_tokens = 0
        self._open: dict[int, Any] = {}
        self._begun: dict[int, float] = {}
        self._reads_until = [0.0] * setting.engines  # one prefix after the other
        self.fetched_tokens = 0

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
            "fetched": self.fetched_tokens / self.prompt_tokens,
            "worth": self.proxies[0].learner.peer_worth,
        }

    def _arrive(self, number: int, arrival: traces.Arrival, now: float) -> None:
        proxy = self.proxies[number % len(self.proxies)]
        chain = tuple(2 * block for block in arrival.blocks)
        tokens = arrival.prompt_tokens
        nodes = proxy.index.matched(chain, (1 << self.setting.engines) - 1)
        held = {slot: min(depth * BLOCK_TOKENS, tokens) for slot, depth in nodes.items()}
        loads = [proxy.ledger.load(slot) for slot in range(self.setting.engines)]
        more_elsewhere = self._gains(held)
        worth = proxy.learner.peer_worth
        seen = {**held, **{slot: held.get(slot, 0) + int(worth * more) for slot, more in more_elsewhere.items()}}
        slot = proxy.rule(loads, seen, tokens)
        new, queued = tokens - seen.get(slot, 0), loads[slot].pending_tokens
        peer = more_elsewhere.get(slot, 0), tokens - held.get(slot, 0)
        lease = proxy.ledger.charge(slot, new, tokens)
        proxy.index.insert(slot, chain, now)
        self._tell(proxy, slot, now)
        for other in self.proxies:
            if other is not proxy and self.setting.gossip:
                self.at(now + GOSSIP_SECONDS, lambda then, o=other: o.index.insert(slot, chain, then))
        sequence = Running(number, arrival.blocks, tokens, arrival.output_tokens)
        self.prompt_tokens += tokens
        self._open[number] = (proxy, lease, now, new, queued, peer)
        came = self._fetch(slot, arrival, now) if more_elsewhere.get(slot) else []
        if came:
            self._reads_until[slot] = (
                max(now, self._reads_until[slot]) + len(came) * BLOCK_TOKENS * self.setting.fetch_seconds
            )
            self.at(self._reads_until[slot], lambda then: self._came(slot, came, sequence, then))
        else:
            self._came(slot, came, sequence, now)

    def _gains(self, held: dict[int, int]) -> dict[int, int]:
        if not self.setting.fetch_seconds:
            return {}
        reaches = {slot: Reach(tokens, tokens, tokens) for slot, tokens in held.items()}
        return gains(range(self.setting.engines), reaches, reaches)

    def _fetch(self, slot: int, arrival: traces.Arrival, now: float) -> Sequence[int]:
        """The blocks that another engine has and this one reads, if reading is sooner than computing."""
        whole = arrival.blocks[: (arrival.prompt_tokens - 1) // BLOCK_TOKENS]
        here = self.engines[slot].leading(whole)
        there = max(engine.leading(whole) for engine in self.engines)
        tokens = max(0, there - here) * BLOCK_TOKENS
        reading = max(0.0, self._reads_until[slot] - now) + tokens * self.setting.fetch_seconds
        computing = T_P * tokens + T_A * tokens * (arrival.prompt_tokens - tokens / 2)
        self.fetched_tokens += tokens if reading < computing else 0
        return whole[here:there] if reading < computing else []

    def _came(self, slot: int, blocks: Sequence[int], sequence: Running, now: float) -> None:
        self.engines[slot].take(blocks)
        self.engines[slot].waiting.append(sequence)
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
            proxy, lease, placed, new, queued, (peer, lacked) = self._open[sequence.number]
            seconds = proxy.learner.model.prefill_seconds(new, sequence.prompt_tokens)
            proxy.ledger.prefilled(lease, seconds)
            if peer:
                proxy.learner.fetched(now - placed, queued, lacked, peer, sequence.prompt_tokens)
            else:
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


def show_peers(title: str, requests: Sequence[traces.Arrival]) -> None:
    """How soon first tokens come when engines read from each other, with and without credit for it."""
    print(f"\n{title}, 8 engines that read from each other\n")
    print("| reading a token / computing it | credit | TTFT mean s | p90 | p99 | read | worth at the end |")
    print("|---|---|---|---|---|---|---|")
    for times in (0.05, 0.25, 0.5, 1.0, 2.0):
        for credit, worth in (("none", 0.0), ("learnt", 0.25)):
            row = Replay("ours", Setting(fetch_seconds=times * T_P, peer_worth=worth)).run(requests)
            print(f"| {times:g} | {credit} | {row['mean']:.3f} | {row['p90']:.2f} | {row['p99']:.1f} "
                  f"| {row['fetched']:.3f} | {row['worth']:.2f} |", flush=True)  # fmt: skip


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}\n")
    print("| rule | hit | TTFT mean s | p50 | p90 | p99 | TPOT ms |\n|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['hit']:.3f} | {row['mean']:.3f} | {row['p50']:.2f} | {row['p90']:.2f} "
              f"| {row['p99']:.1f} | {row['tpot_ms']:.1f} |", flush=True)  # fmt: skip


def floor(requests: Sequence[traces.Arrival]) -> float:
    """Mean TTFT in seconds that no rule beats: every prompt alone on an engine that has kept all earlier ones."""
    kept: set[int] = set()
    seconds = []
    for arrival in requests:
        whole = arrival.blocks[: (arrival.prompt_tokens - 1) // BLOCK_TOKENS]
        hit = next((at for at, block in enumerate(whole) if block not in kept), len(whole)) * BLOCK_TOKENS
        kept.update(arrival.blocks)
        new = arrival.prompt_tokens - hit
        seconds.append(T_P * new + T_A * new * (arrival.prompt_tokens - new / 2))
    return statistics.fmean(seconds)


def show_proxies(title: str, requests: Sequence[traces.Arrival]) -> None:
    """What several proxies lose to one, beyond what a seed moves."""
    print(f"\n{title}, 8 engines, load 1, several proxies, over {len(SEEDS)} seeds\n")
    print("| proxies | TTFT mean s | least | most | of one proxy's |\n|---|---|---|---|---|")
    one = 0.0
    for proxies, gossip in ((1, True), (2, True), (4, True), (4, False)):
        setting = Setting(proxies=proxies, gossip=gossip)
        means = [Replay("ours", setting, seed).run(requests)["mean"] for seed in SEEDS]
        mean = statistics.fmean(means)
        one = one or mean
        label = f"{proxies}" + ("" if gossip else ", each alone")
        print(f"| {label} | {mean:.3f} | {min(means):.3f} | {max(means):.3f} | {mean / one:.3f} |", flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks router_rules")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--requests", type=int, default=3400)
    parser.add_argument("--quick", action="store_true", help="one setting instead of all")
    parser.add_argument("--peers", action="store_true", help="engines that read from each other")
    parser.add_argument("--proxies", action="store_true", help="several proxies before the same engines")
    options = parser.parse_args(arguments)

    def arrivals(load: float) -> list[traces.Arrival]:
        if options.trace is None:
            return traces.agentic(options.requests, load)
        return traces.read_mooncake(options.trace, options.requests, load)

    what = options.trace.name if options.trace is not None else "agentic sessions"
    everyone = arrivals(1.0)
    if options.peers:
        show_peers(what, everyone)
        return 0
    if options.proxies:
        show_proxies(what, everyone)
        return 0
    show(f"{what}, 8 engines, load 1", {name: Replay(name, Setting()).run(everyone) for name in RULES})
    print(f"\nno rule is below {floor(everyone):.3f} s: every prompt alone on an engine that has kept all earlier ones")
    if options.quick:
        return 0
    for engines, load in ((4, 0.5), (16, 2.0), (32, 4.0), (8, 0.3), (8, 1.4)):
        requests = arrivals(load)
        rows = {name: Replay(name, Setting(engines)).run(requests) for name in RULES[:6]}
        show(f"{what}, {engines} engines, load {load:g}", rows)
    show_proxies(what, everyone)
    return 0
