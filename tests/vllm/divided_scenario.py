"""Prefill and decode engines with unequal tensor parallelism, and real transports between them.

A program: `python -m tests.vllm.divided_scenario MODEL`. As `handoff_scenario`, with KV that differs from head to head:
each rank holds its own heads, and checks every value of every position before a step uses it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.kv_cache_interface import KVCacheGroupSpec

from tests.vllm.handoff_scenario import (
    ANSWER_TOKENS,
    HBM_GB,
    Engine,
    Fleet,
    RankedWorker,
    after_all,
    before_words,
    many_at_once,
)
from tests.vllm.handoff_tickets import signed
from tests.vllm.simulated_engine import BLOCK, LAYERS, SPEC, Mode, ours
from tests.vllm.version_scenario import prompt

HEADS, WIDTH = 4, 2 * SPEC.head_size
#: Of prefill and of decode.
WORKERS = ((2, 1), (1, 2), (4, 2), (2, 4))


class DividedWorker(RankedWorker):
    def __init__(self, vllm_config: Any, kv_cache_config: Any, mode: Mode) -> None:
        self._heads = HEADS // mode.workers
        super().__init__(vllm_config, kv_cache_config, mode)
        first = vllm_config.parallel_config.rank * self._heads
        all_heads = torch.arange(HEADS * WIDTH).reshape(HEADS, WIDTH) / (HEADS * WIDTH)  # exact beside the numbers
        self.of_heads = all_heads[first : first + self._heads]

    def allocate(self, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return super().allocate((shape[0], self._heads, *shape[2:]))


class DividedEngine(Engine):
    worker_class = DividedWorker

    def __init__(self, model: str, mode: Mode, *flags: str) -> None:
        self.groups = (KVCacheGroupSpec(list(LAYERS), replace(SPEC, num_kv_heads=HEADS // mode.workers)),)
        super().__init__(model, mode, *flags)

    def config(self, model: str, *flags: str) -> Any:
        config = super().config(model, *flags)
        object.__setattr__(config.model_config, "get_total_num_kv_heads", lambda: HEADS)
        return config


class DividedFleet(Fleet):
    engine_class = DividedEngine

    def __init__(self, model: str, prefill: int, decode: int, hbm_gb: float) -> None:
        modes = [Mode(f"{workers} workers", workers=workers) for workers in (prefill, decode)]
        super().__init__(model, modes[0], 20_000, hbm_gb, modes[1])

    def refill(self, worker: Any) -> None:
        """The slots of this rank hold other KV than they did."""
        dram = ours(worker.connector)._worker._transfers._dram
        for slot, key in enumerate(list(dram._keys)):
            if key is not None:
                dram.set_key(slot, None)
                dram.rows[slot] = 77


def handed_over(fleet: DividedFleet, name: str, number: int, **changes: Any) -> int:
    """Returns how many blocks the prompt has."""
    tokens = prompt(number, 150 + 7 * number % 90)
    ticket = fleet.computed(f"p-{name}", tokens)
    fleet.decode.ask(name, tokens, ANSWER_TOKENS, signed({**ticket, **changes}))
    fleet.decoded(name)
    return len(tokens) // BLOCK


def every_block_comes(fleet: DividedFleet) -> None:
    blocks = sum(handed_over(fleet, f"d{number}", number) for number in range(4))
    counts = fleet.decode.take_counts()
    assert counts["hit_blocks|peer"] == blocks, counts
    assert not [key for key in counts if key.startswith(("load_failures", "nixl_refused"))], counts
    parts = max(len(fleet.prefill.workers), len(fleet.decode.workers))
    assert counts["nixl_read_blocks|"] == blocks * parts, counts
    row_bytes = len(LAYERS) * HEADS * BLOCK * WIDTH * 4
    assert counts["nixl_read_bytes|"] == blocks * row_bytes, counts
    fleet.settle()
    ended = {key: count for key, count in fleet.prefill.take_counts().items() if "leases_ended" in key}
    assert ended == {"nixl_leases_ended|done": 4 * len(fleet.prefill.workers)}, ended


def one_rank_alone_makes_a_miss(fleet: DividedFleet) -> None:
    """The last rank's slots are re-used while its READs are under way; those of others are as they were."""
    port = ours(fleet.prefill.workers[-1].connector)._worker._peers._server.port
    before_words(lambda peer: fleet.refill(fleet.prefill.workers[-1]) if peer.endswith(f":{port}") else None)
    blocks = handed_over(fleet, "stale", 400)
    after_all()
    counts = fleet.decode.take_counts()
    assert counts["nixl_fences_refused|other_generation"], counts
    # Where two ranks read that one, the second may find its blocks gone.
    assert counts["load_failures|stale"] + counts["load_failures|gone"] == blocks, counts


def a_client_that_leaves_costs_no_slot(fleet: DividedFleet) -> None:
    """At whatever step its load is; every rank of both sides hears of it."""
    fleet.settle()
    fleet.prefill.take_counts()
    for steps in range(4):
        tokens, name = prompt(450 + steps, 200), f"leaves{steps}"
        fleet.decode.ask(name, tokens, ANSWER_TOKENS, fleet.computed(f"p-{name}", tokens))
        for _ in range(steps):
            fleet.decode.step()
        fleet.decode.abort(name)
    fleet.settle()
    ended = {key: count for key, count in fleet.prefill.take_counts().items() if "leases_ended" in key}
    assert ended == {"nixl_leases_ended|done": 4 * len(fleet.prefill.workers)}, ended
    fleet.decode.take_counts()
    blocks = handed_over(fleet, "stays", 460)
    assert fleet.decode.take_counts()["hit_blocks|peer"] == blocks


def what_does_not_fit_is_computed(fleet: DividedFleet) -> None:
    """Three ranks cannot share four heads; and a rank that is not who the ticket says is another model's."""
    handed_over(fleet, "odd", 500, tp_size=3)
    counts = fleet.decode.take_counts()
    assert counts["nixl_refused_peers|other_parallelism"] == len(fleet.decode.workers), counts
    assert counts["load_failures|refused"], counts
    handed_over(fleet, "liar", 501, tp_size=HEADS // len(fleet.prefill.workers))
    counts = fleet.decode.take_counts()
    assert counts["nixl_refused_peers|other_model"], counts
    assert counts["load_failures|refused"], counts


def main(model: str) -> None:
    for number, (prefill, decode) in enumerate(WORKERS):
        fleet = DividedFleet(model, prefill, decode, HBM_GB if number % 2 else 0)
        try:
            every_block_comes(fleet)
            many_at_once(fleet, 1)
            one_rank_alone_makes_a_miss(fleet)
            a_client_that_leaves_costs_no_slot(fleet)
            if (prefill, decode) == (1, 2):
                what_does_not_fit_is_computed(fleet)
        finally:
            fleet.close()
        print(f"ok: {prefill} to {decode}", flush=True)
    print("ok: no wrong byte", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
