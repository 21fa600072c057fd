"""Thousands of requests to a real prefill and a real decode vLLM, a random fault each: every answer must be right.

    handoff_storm [MINUTES [SEED [CLIENTS]]]

Between the engines stands somebody who sees every message and may lose, double or delay it, end its lease, or stop
or kill an engine at that moment. Several clients ask at once. What the prefill engine answers alone, before any
fault, is right; weights in float32, so that the shape of a batch changes no token. Only a client that leaves, or one
whose decode engine is killed, may end without an answer.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.handoff_columns import OurPair
from benchmarks.handoff_middle import KINDS, SIDES, Engines, Middle, Plan
from dynamo_connectors.transport.messages import (
    End,
)
from dynamo_connectors.vllm.fetch import name_of
from dynamo_connectors.vllm.handoff import Identity
from tests.vllm.client import prompt, wait_until
from tests.vllm.handoff_tickets import SECRET, signed
from tests.vllm.pair import Pair
from tools.tiny_model import make_model
from tools.vllm_server import MODEL_NAME

CLIENTS = 16
#: Twice what both engines hold: a prompt that comes again is nowhere.
PROMPTS = 200
CHUNKS = 2
ANSWER_TOKENS = 6
HOST_GB = "0.03"
DEADLINE_MS = "2000"
#: Longer than a lease.
AGED_SECONDS = 33.0
STANDS_SECONDS = (0.2, 4.0)
STEPS = ("Ask", "Grant", "Done")
#: Fault -> how often, beside the others.
FAULTS: dict[str, float] = {
    "none": 4,
    "another prompt's ticket": 6,
    "ticket of no lease": 4,
    "ticket of an unsigned lease": 2,
    "ticket as old as its lease, blocks re-used": 4,
    "lossy": 10,
    "client leaves": 8,
    "fetched, lossy": 10,
    **{f"no {step}": 2 for step in STEPS},
    **{f"late {step}": 4 for step in STEPS},
    **{f"lease ended at {step}": 5 for step in STEPS},
    **{f"{side} stopped at {step}": 0.3 for side in SIDES for step in STEPS},
}
#: Engines that are killed, one after the other, at these messages, evenly over the time.
KILLS = (("prefill", "Grant"), ("decode", "Done"), ("prefill", "Done"), ("decode", "Grant"))


TOLD = (
    "dynamo_kvbm_hit_blocks_total",
    "dynamo_kvbm_load_failures_total",
    "dynamo_nixl_read_blocks_total",
    "dynamo_nixl_fences_refused_total",
    "dynamo_nixl_late_reads_total",
    "dynamo_nixl_restarts_total",
    "dynamo_nixl_silent_peers_total",
    "dynamo_nixl_refused_messages_total",
)


class StormPair(OurPair):
    def flags(self, role: str) -> list[str]:
        return [*super().flags(role), "--kvbm-host-dram-gb", HOST_GB]


class Ended(NamedTuple):
    """`how` is empty when nothing was asked; `seconds`: the decode engine's answer, without that to the ticket."""

    fault: str
    how: str = ""
    seconds: float = 0.0


class Storm:
    def __init__(self, pair: StormPair, engines: Engines, seed: int, clients: int) -> None:
        self._pair = pair
        self._clients = clients
        self._chance = random.Random(seed)
        self.engines = engines
        for event in self.engines.ready.values():
            event.set()
        self.middle = Middle(pair._peer_port, random.Random(seed + 1))
        self.ended: list[Ended] = []
        #: Seconds until the prefill engine gave one out.
        self.tickets: list[float] = []
        self._alone: list[tuple[int, ...]] = []
        self._numbers = iter(range(1 << 62))
        #: Prompt, ticket, and when it was given.
        self._aged: deque[tuple[int, dict[str, Any], float]] = deque()
        self._lock = threading.Lock()
        self._ends = 0.0

    def learn(self) -> None:
        with ThreadPoolExecutor(self._clients) as pool:
            self._alone = list(pool.map(self._answer_alone, range(PROMPTS)))

    def rage(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds
        killer = threading.Thread(target=self._kill_now_and_then, args=(seconds,))
        killer.start()
        with ThreadPoolExecutor(self._clients) as pool:
            clients = [pool.submit(self._keep_asking) for _ in range(self._clients)]
            while wait(clients, timeout=60).not_done:
                print(f"{self._ends - time.monotonic():.0f} s to go: {ends_of(self.ended)}", flush=True)
            for client in clients:
                client.result()
        killer.join()
        self.engines.settle()
        self.middle.plans.clear()

    def _answer_alone(self, number: int) -> tuple[int, ...]:
        return self._pair.prefill.complete(prompt(number + 1, CHUNKS), ANSWER_TOKENS).tokens

    def _kill_now_and_then(self, seconds: float) -> None:
        for side, kind in KILLS if seconds >= 240 else ():
            time.sleep(seconds / (len(KILLS) + 1))
            act = lambda side=side, kind=kind: self.engines.kill(side, kind)  # noqa: E731
            self.middle.breaks_in.append(Plan(KINDS[kind], act))

    def _keep_asking(self) -> None:
        while time.monotonic() < self._ends:
            with self._lock:
                number = next(self._numbers) % PROMPTS
                fault = self._chance.choices(list(FAULTS), list(FAULTS.values()))[0]
            if not self.engines.ready["prefill"].is_set():
                fault = "ticket of an engine that was killed"
            self.engines.ready["decode"].wait()
            lives = self.engines.lives
            ended = self._one(fault, number)
            if ended.how.startswith("error"):
                ended = ended._replace(how="error: decode was killed") if self.engines.lives > lives else ended
                self.engines.revive("decode")
            if ended.how:
                self.ended.append(ended)

    def _one(self, fault: str, number: int) -> Ended:
        started = time.monotonic()
        try:
            if "old" in fault or "killed" in fault:
                return self._with_an_old_ticket(fault, number)
            ticket = self._ticket(fault, number)
            self.tickets.append(time.monotonic() - started)
        except (OSError, http.client.HTTPException):
            time.sleep(0.2)
            self.engines.revive("prefill")
            return Ended(fault)  # the prefill engine was killed under it: no ticket, no hand-off
        lease = bytes.fromhex(ticket.get("dynamo_lease", ""))
        if (plan := self._plan(fault, lease)) is not None:
            self.middle.plans[lease] = plan
        ended = self._ask(fault, number, ticket)
        # An engine that others' faults have made silent is not asked for a while.
        return ended if plan is None or plan.is_met else ended._replace(fault="none: nothing was asked of the peer")

    def _ticket(self, fault: str, number: int) -> dict[str, Any]:
        tokens = prompt(number + 1, CHUNKS)
        if fault.startswith("fetched"):
            self._pair.prefill.complete(tokens, 1)
            name = name_of(Identity("", "127.0.0.1", self.middle.port, 1, SECRET))
            return {"kvbm_peer": name, "kvbm_peer_tokens": len(tokens)}
        if fault == "another prompt's ticket":
            tokens = prompt(number + 1 + PROMPTS, CHUNKS)
        ticket = self._pair.ticket(tokens)
        if fault == "ticket of no lease":
            ticket["dynamo_lease"] = os.urandom(16).hex()
        ticket = signed({**ticket, "remote_port": self.middle.port})
        return {**ticket, "dynamo_lease": os.urandom(16).hex()} if fault == "ticket of an unsigned lease" else ticket

    def _with_an_old_ticket(self, fault: str, number: int) -> Ended:
        gives_none_out = "killed" in fault
        with self._lock:
            old = self._aged and time.monotonic() - self._aged[0][2] >= (0.0 if gives_none_out else AGED_SECONDS)
            at, ticket, _ = self._aged.popleft() if old else (number, None, 0.0)
        if ticket is not None:
            return self._ask(fault, at, ticket)
        if gives_none_out:
            time.sleep(0.2)
        else:
            self._aged.append((number, self._ticket("", number), time.monotonic()))
        return Ended(fault)

    def _plan(self, fault: str, lease: bytes) -> Plan | None:
        chance, engines = self._chance, self.engines
        kind = KINDS.get(fault.rpartition(" ")[2])
        if fault == "lossy":
            return Plan(times=lambda: chance.choice((0, 1, 1, 2)))
        if kind is None:
            return None
        if fault.startswith("no "):
            return Plan(kind, times=lambda: 0)
        if fault.startswith("late "):
            return Plan(kind, delay=lambda: chance.uniform(0.1, 2.5))
        if fault.startswith("lease ended at "):
            return Plan(kind, lambda: self.middle.say(End(os.urandom(8), lease)))
        side, seconds = fault.partition(" ")[0], chance.uniform(*STANDS_SECONDS)
        return Plan(kind, lambda: engines.stop_for(side, seconds))

    def _ask(self, fault: str, number: int, ticket: dict[str, Any]) -> Ended:
        started = time.monotonic()
        how = (self._leave if fault == "client leaves" else self._judge)(number, ticket)
        return Ended(fault, how, time.monotonic() - started)

    def _judge(self, number: int, params: dict[str, Any]) -> str:
        try:
            said = self._pair.decode.complete(prompt(number + 1, CHUNKS), ANSWER_TOKENS, kv_transfer_params=params)
        except (OSError, http.client.HTTPException) as error:
            return f"error: {error!r:.80}"
        return "right" if said.tokens == self._alone[number] else "WRONG"

    def _leave(self, number: int, params: dict[str, Any]) -> str:
        body = {"model": MODEL_NAME, "prompt": prompt(number + 1, CHUNKS), "max_tokens": 400, "ignore_eos": True}
        host = self._pair.decode.url.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=60)
        try:
            text = json.dumps({**body, "stream": True, "kv_transfer_params": params})
            connection.request("POST", "/v1/completions", text, {"content-type": "application/json"})
            time.sleep(self._chance.uniform(0.0, 0.3))
        except (OSError, http.client.HTTPException) as error:
            return f"error: {error!r:.80}"
        finally:
            connection.close()
        return "left"


def left_of(pair: Pair) -> dict[str, float]:
    """What is leased, pinned, quarantined or under way: the gauges that are not at nothing."""
    for client in (pair.prefill, pair.decode):  # gauges are published by steps
        client.complete(prompt(1 << 20, 1), 1)
    gauges = {
        "prefill": (pair.prefill, "dynamo_nixl_open_leases", "dynamo_kvbm_pinned_blocks", "vllm:num_requests_running"),
        "decode": (
            pair.decode,
            "dynamo_nixl_quarantined_bytes",
            "dynamo_kvbm_pinned_blocks",
            "vllm:num_requests_running",
        ),
    }
    now = {f"{name} of {role}": client.metric(name) for role, (client, *names) in gauges.items() for name in names}
    return {what: value for what, value in now.items() if value}


def ends_of(ended: Sequence[Ended]) -> dict[str, int]:
    return dict(Counter(each.how for each in ended))


def label_of(labels: dict[str, str]) -> str:
    return labels.get("tier") or labels.get("reason") or ""


def slower(pair: Pair, name: str, **labels: str) -> dict[str, int]:
    """Of a histogram of seconds of the decode engine: how many took longer, and how many there were ("0")."""
    reached = {each.labels["le"]: int(each.value) for each in pair.decode.series(f"{name}_bucket", **labels)}
    total = reached.pop("+Inf", 0)
    return {"0": total, **{seconds: total - count for seconds, count in reached.items() if float(seconds) >= 1.0}}


def report(storm: Storm, pair: Pair) -> bool:
    table = Counter((ended.fault, ended.how) for ended in storm.ended)
    for (fault, how), count in sorted(table.items()):
        longest = max(each.seconds for each in storm.ended if (each.fault, each.how) == (fault, how))
        print(f"{fault:45} {how:28} {count:6}   longest {longest:5.1f} s")
    for note in storm.engines.notes:
        print(note)
    faulted = sum(count for (fault, _), count in table.items() if not fault.startswith("none"))
    ends = ends_of(storm.ended)
    tokens = ends.get("right", 0) * ANSWER_TOKENS
    print(f"{len(storm.ended)} requests, {faulted} with a fault of their own: {ends}; {tokens} tokens compared")
    print(f"the prefill engine's tickets took {max(storm.tickets):.1f} s at most")
    print(
        f"answers of the decode engine, slower than so many seconds: {slower(pair, 'vllm:e2e_request_latency_seconds')}"
    )
    loads = slower(pair, "dynamo_kvbm_transfer_seconds", what="onboard", tier="peer")
    print(f"its loads from the prefill engine, slower than that (deadline {DEADLINE_MS} ms): {loads}")
    for name in TOLD:
        told = {label_of(each.labels): int(each.value) for each in pair.decode.series(name) if each.value}
        print(f"{name} of the decode engine since its start: {told}")
    allowed = {"right", "left", "error: decode was killed"}
    return set(ends) <= allowed


def main(arguments: Sequence[str]) -> int:
    minutes = float(arguments[0]) if arguments else 8.0
    seed = int(arguments[1]) if len(arguments) > 1 else 7
    clients = int(arguments[2]) if len(arguments) > 2 else CLIENTS
    os.environ["UCX_LOG_LEVEL"] = "error"
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        pair = StormPair(make_model(folder / "model"), folder, ["--kvbm-peer-deadline-ms", DEADLINE_MS], "tcp")
        engines = Engines(pair)
        stack.callback(engines.close)
        stack.callback(pair.close)
        pair.start()
        storm = Storm(pair, engines, seed, clients)
        stack.callback(storm.middle.close)
        storm.learn()
        try:
            storm.rage(60 * minutes)
        finally:
            good = report(storm, pair)
        try:
            wait_until(lambda: not left_of(pair), "nothing is leased, pinned or quarantined", 90.0)
        except AssertionError:
            print(f"left: {left_of(pair)}")
            raise
        print("at the end no lease, no pin, no quarantine, no request is left")
        for log in folder.glob("*.log"):
            _, found, what = log.read_text().partition("Traceback")
            good &= not found
            print(f"{log.name}: Traceback{what[:2000]}" if found else f"{log.name}: no traceback")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
