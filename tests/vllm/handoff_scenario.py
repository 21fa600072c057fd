"""Prefill on one engine, decode on another, with real transports between them and everything going wrong.

A program: `python -m tests.vllm.handoff_scenario MODEL [REQUESTS]`. Both engines are simulated (`simulated_engine`: the
real scheduler and connector, made-up KV that is checked at every position a step attends to), so a wrong byte of a peer
is an AssertionError at the step that would have used it. It prints one line per part that passed.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from vllm import SamplingParams
from vllm.v1.request import Request

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.transport.data_plane import DataPlane
from dynamo_connectors.transport.messages import Ask, Done, Grant, Hello
from dynamo_connectors.vllm.fetch import name_of
from dynamo_connectors.vllm.handoff import Identity
from dynamo_connectors.vllm.hints import PEER
from tests.transport.peers import Between
from tests.vllm.handoff_tickets import SECRET, signed
from tests.vllm.simulated_engine import BLOCK, Mode, SimulatedEngine, SimulatedWorker, Truth, ours
from tests.vllm.version_scenario import engine_config, prompt
from tools.server_process import free_port

HBM_BLOCKS = 40
#: Room for nine blocks, of which a read takes one and a load four.
HBM_GB = 0.0003
ANSWER_TOKENS = 4
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


class RankedWorker(SimulatedWorker):
    """Knows its rank, as a real worker does."""

    ranks = 0

    def __init__(self, vllm_config: Any, kv_cache_config: Any, mode: Mode) -> None:
        vllm_config.parallel_config.rank = RankedWorker.ranks % mode.workers
        RankedWorker.ranks += 1
        super().__init__(vllm_config, kv_cache_config, mode)


class Engine(SimulatedEngine):
    worker_class = RankedWorker

    def __init__(self, model: str, mode: Mode, *flags: str) -> None:
        size = ["--kv-connector", "dynamo", "--kvbm-load-gate", "off", "--kvbm-host-dram-gb", "0.002"]
        super().__init__(self.config(model, *size, *flags), mode, HBM_BLOCKS)
        self.tickets: dict[str, dict[str, Any]] = {}
        self.counts: Counter[str] = Counter()
        self.hashes: dict[str, list[BlockKey]] = {}
        update = self.scheduler.update_from_output

        def updated(*arguments: Any) -> Any:
            outputs = update(*arguments)
            for client_outputs in outputs.values():
                for output in client_outputs.outputs:
                    if output.kv_transfer_params:
                        self.tickets[output.request_id] = output.kv_transfer_params
            return outputs

        self.scheduler.update_from_output = updated

    def config(self, model: str, *flags: str) -> Any:
        return engine_config(model, *flags)

    def ask(self, name: str, tokens: Sequence[int], answer: int, params: dict[str, Any]) -> None:
        sampling = SamplingParams(max_tokens=answer, ignore_eos=True, extra_args={"kv_transfer_params": params})
        request = Request(name, list(tokens), sampling, None, block_hasher=self._block_hasher)
        self.hashes[name] = list(map(BlockKey, request.block_hashes))
        self._truths[name], self.answers[name] = Truth.of(tokens, answer), []
        self.scheduler.add_request(request)

    def take_counts(self) -> Counter[str]:
        """All that the metrics have been told since the last call, scheduler and workers together."""
        for stats in self.stats:
            self.counts.update(stats.get("counts", {}))
        self.stats.clear()
        counts, self.counts = self.counts, Counter()
        return counts


class Fleet:
    """A prefill and a decode engine, and somebody between them."""

    engine_class: type[Engine] = Engine

    def __init__(
        self, model: str, mode: Mode, deadline_ms: int, hbm_gb: float = HBM_GB, decode_mode: Mode | None = None
    ) -> None:
        self.port = free_port()
        self.has_window = bool(hbm_gb)
        port = ["--kvbm-peer-port", str(self.port), "--kvbm-peer-hbm-gb", str(hbm_gb)]
        self.prefill = self.engine_class(model, mode, "--kvbm-role", "prefill", *port)
        deadline = ["--kvbm-peer-deadline-ms", str(deadline_ms), "--kvbm-peer-hbm-gb", str(hbm_gb)]
        self.decode = self.engine_class(model, decode_mode or mode, "--kvbm-role", "decode", *deadline)
        self.between_port = free_port()
        self.between = Between(self.between_port, self.port, SECRET)

    def run_until(self, condition: Callable[[], bool], seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the engines do not come to an end"
            self.prefill.step()
            self.decode.step()

    def computed(self, name: str, tokens: Sequence[int], asked: dict[str, Any] = PREFILL) -> dict[str, Any]:
        """The prefill leg: the ticket, as the proxy gets it."""
        self.prefill.ask(name, tokens, 1, asked)
        self.run_until(lambda: name in self.prefill.tickets)
        return self.prefill.tickets[name]

    def decoded(self, *names: str) -> None:
        """The decode leg: every answer is right, whatever happened."""
        self.run_until(lambda: all(len(self.decode.answers[name]) == ANSWER_TOKENS for name in names))
        for name in names:
            self.decode.expect_answer(name)

    def kept(self, name: str, tokens: Sequence[int]) -> dict[str, Any]:
        """Some request of its own has left the prompt's KV in the prefill engine's host memory; where that is."""
        told = self.computed(name, tokens, {"kvbm_tell_peer": True})
        return {**told, "kvbm_peer_tokens": len(tokens)}

    def through_between(self, ticket: dict[str, Any]) -> dict[str, Any]:
        if PEER in ticket:
            return {**ticket, PEER: name_of(Identity("", "127.0.0.1", self.between_port, 1, SECRET))}
        return signed({**ticket, "remote_port": self.between_port})

    def settle(self) -> None:
        """Nothing is under way, and no lease is open."""

        def leases() -> int:
            peers = [ours(worker.connector)._worker._peers for worker in self.prefill.workers]
            return sum(each.levels()["nixl_open_leases"] for each in peers)

        def keep_stepping() -> bool:
            # An idle engine need not hear that a lease has ended; the next request's steps tell it.
            name = f"idle{len(self.prefill.answers)}"
            self.prefill.ask(name, prompt(len(name), 3), 1, {})
            self.run_until(lambda: bool(self.prefill.answers[name]))
            return leases() == 0 and not ours(self.prefill.scheduler.connector)._scheduler._ledger._jobs

        self.run_until(keep_stepping, 180.0)
        self.run_until(lambda: not self.decode.scheduler.has_requests())
        for engine in (self.prefill, self.decode):
            ours(engine.scheduler.connector)._scheduler.check()

    def close(self) -> None:
        self.decode.close()
        self.prefill.close()
        self.between.close()


def hand_over(fleet: Fleet, count: int) -> None:
    """Every block of the prompt but the last, partial one comes from the prefill engine."""
    blocks = 0
    for number in range(count):
        tokens = prompt(number, 150 + 7 * number % 90)
        blocks += len(tokens) // BLOCK
        fleet.decode.ask(f"d{number}", tokens, ANSWER_TOKENS, fleet.computed(f"p{number}", tokens))
        fleet.decoded(f"d{number}")
    counts = fleet.decode.take_counts()
    assert counts["hit_blocks|peer"] == blocks, counts
    assert not [key for key in counts if key.startswith("load_failures")], counts
    assert counts["nixl_read_blocks|"] == blocks * len(fleet.decode.workers), counts
    assert counts["nixl_window_blocks|"] == counts["nixl_read_blocks|"] * fleet.has_window, counts


def many_at_once(fleet: Fleet, rounds: int) -> None:
    for number in range(rounds):
        names = [f"many{number}-{each}" for each in range(4)]
        prompts = [prompt(1000 + 10 * number + each, 100 + 20 * each) for each in range(4)]
        for name, tokens in zip(names, prompts, strict=True):
            fleet.prefill.ask(name, tokens, 1, PREFILL)
        fleet.run_until(lambda names=names: all(name in fleet.prefill.tickets for name in names))
        for name, tokens in zip(names, prompts, strict=True):
            fleet.decode.ask(name, tokens, ANSWER_TOKENS, fleet.prefill.tickets[name])
        fleet.decoded(*names)


def fetch(fleet: Fleet, count: int) -> None:
    """Blocks that the prefill engine happens to hold come from there, and what it does not hold is computed."""
    fleet.decode.take_counts()
    blocks = 0
    for number in range(count):
        tokens = prompt(20_000 + number, 150 + 7 * number % 90)
        blocks += len(tokens) // BLOCK
        hint = fleet.kept(f"k{number}", tokens)
        fleet.run_until(lambda: not fleet.prefill.scheduler.has_requests() and not has_work(fleet.prefill))
        longer = [*tokens, *prompt(21_000 + number, 2 * BLOCK)]
        fleet.decode.ask(f"e{number}", longer, ANSWER_TOKENS, {**hint, "kvbm_peer_tokens": len(longer)})
        fleet.decoded(f"e{number}")
    counts = fleet.decode.take_counts()
    assert counts["hit_blocks|peer"] == blocks, counts
    failed = {key for key in counts if key.startswith("load_failures")}
    assert failed == {"load_failures|gone"}, counts
    assert counts["nixl_peer_hints|"] == count


def has_work(engine: Engine) -> bool:
    return bool(ours(engine.scheduler.connector)._scheduler.has_work)


def refill(fleet: Fleet, keys: Sequence[BlockKey]) -> None:
    """The published corruption: the slots of these blocks hold another prompt's KV."""
    for worker in fleet.prefill.workers:
        dram = ours(worker.connector)._worker._transfers._dram
        for slot in filter(lambda slot: slot is not None, map(dram.slot_of, keys)):
            dram.write(slot, BlockKey(b"foreign"), memoryview(os.urandom(dram.row_bytes)))


def refill_window(fleet: Fleet) -> None:
    """The rows of every READ serve another one by now, as if it had been given up."""
    for worker in fleet.prefill.workers:
        server = ours(worker.connector)._worker._peers._server
        with server._lock:
            desk = server._owner._desk
            ready = [serving for serving in desk._reads.values() if serving.state == "ready"]
            for row in (row for serving in ready for row in serving.in_use):
                desk._generations[row] += 1
                server._window.rows.rows[row] = 77


_post_words = DataPlane.post_words


def before_words(act: Callable[[str], object]) -> None:
    """Between each READ and that of its words; `act` gets the peer's address."""

    def post_words(plane: DataPlane, read: int, peer: str, *what: Any) -> str | None:
        act(peer)
        return _post_words(plane, read, peer, *what)

    DataPlane.post_words = post_words  # type: ignore[assignment, method-assign]


def after_all() -> None:
    DataPlane.post_words = _post_words  # type: ignore[method-assign]


def faulted(fleet: Fleet, number: int, chance: random.Random) -> str:
    """One request with one fault. Its answer is right; what the fault was is returned."""
    tokens, name = prompt(50_000 + number, chance.randrange(70, 230)), f"f{number}"
    fault, fetches = chance.choice(FAULTS), chance.random() < 0.5
    fetches = fetches and "ticket" not in fault
    ticket = (fleet.kept if fetches else fleet.computed)(f"p-{name}", tokens)
    keys = fleet.prefill.hashes[f"p-{name}"]
    fleet.between.hook = lambda message: 1
    after_all()
    through = fleet.through_between(ticket)
    if fault == "another prompt's ticket":
        through = fleet.through_between(fleet.computed(f"q-{name}", prompt(90_000 + number, 200)))
    elif fault == "ticket of no engine":
        through = signed({**through, "dynamo_lease": os.urandom(16).hex()})
    elif fault == "lease over, slots re-used":
        refill(fleet, keys)
        for worker in fleet.prefill.workers:
            ours(worker.connector)._worker._peers._server._owner.revoke_all()
    elif fault == "slots re-used at words":
        before_words(lambda peer: refill(fleet, keys))
    elif fault == "window re-used at words":
        before_words(lambda peer: refill_window(fleet))
    elif fault.startswith("slots re-used at "):
        fleet.between.at(KINDS[fault.rsplit(" ", 1)[1]], partial(refill, fleet, keys))
    elif fault.startswith("window re-used at "):
        fleet.between.at(KINDS[fault.rsplit(" ", 1)[1]], partial(refill_window, fleet))
    elif fault.startswith("silence at "):
        kind = KINDS[fault.rsplit(" ", 1)[1]]
        fleet.between.hook = lambda message: 0 if isinstance(message, kind) else 1
    elif fault == "lossy network":
        fleet.between.hook = lambda message: chance.choice((0, 1, 1, 2))
    fleet.decode.ask(name, tokens, ANSWER_TOKENS, through)
    if fault == "client leaves":
        for _ in range(chance.randrange(3)):
            fleet.decode.step()
        fleet.decode.abort(name)
    else:
        fleet.decoded(name)
    return f"{fault}, fetched" if fetches else fault


KINDS: dict[str, type] = {kind.__name__: kind for kind in (Hello, Ask, Grant, Done)}
FAULTS = [
    "none",
    "another prompt's ticket",
    "ticket of no engine",
    "lease over, slots re-used",
    *(f"slots re-used at {kind}" for kind in ("Ask", "Grant", "words")),
    *(f"window re-used at {kind}" for kind in ("Grant", "words")),
    *(f"silence at {kind}" for kind in ("Ask", "Grant", "Done")),
    "lossy network",
    "client leaves",
]


def faults(fleet: Fleet, count: int) -> None:
    chance = random.Random(7)
    seen = Counter(faulted(fleet, number, chance) for number in range(count))
    fleet.between.hook = lambda message: 1
    after_all()
    counts = fleet.decode.take_counts()
    print("faults:", dict(sorted(seen.items())))
    print("told:", {key: counts[key] for key in sorted(counts) if "fail" in key or "nixl" in key or "hit_" in key})
    # What is in the window already does not care for host memory any more.
    what = "window re-used at " if fleet.has_window else "slots re-used at "
    stale = sum(seen[fault] for fault in seen if fault.startswith(what))
    assert counts["load_failures|stale"] or not stale, "no fence ever refused"
    assert counts["hit_blocks|peer"], "nothing was ever handed over"


def reset(fleet: Fleet) -> None:
    """Between ticket and reading, and of a request after it: nothing is handed over any more."""
    tokens = prompt(70_000, 200)
    ticket = fleet.computed("p-reset", tokens)
    fleet.prefill.scheduler.reset_prefix_cache(reset_connector=True)
    fleet.decode.ask("reset", tokens, ANSWER_TOKENS, ticket)
    fleet.decoded("reset")
    tokens = prompt(70_001, 200)
    fleet.decode.take_counts()
    fleet.decode.ask("after", tokens, ANSWER_TOKENS, fleet.computed("p-after", tokens))
    fleet.decoded("after")
    assert not fleet.decode.take_counts()["hit_blocks|peer"], "a reset engine was met"


def main(model: str, requests: int) -> None:
    for mode in (Mode("one worker"), Mode("two workers, async scheduling", workers=2, async_scheduling=True)):
        fleet = Fleet(model, mode, 20_000)
        try:
            hand_over(fleet, 8)
            many_at_once(fleet, 3)
            fetch(fleet, 4)
            fleet.settle()
        finally:
            fleet.close()
        print(f"ok: {mode.name}", flush=True)
    for hbm_gb in (HBM_GB, 0):
        fleet = Fleet(model, Mode("faults"), 300, hbm_gb)
        try:
            faults(fleet, requests // 2)
            reset(fleet)
            fleet.settle()
        finally:
            fleet.close()
    print(f"ok: {requests} requests with faults, no wrong byte", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 60)
