"""Full attention beside a sliding window under vLLM's real scheduler, KV cache manager and connector hooks.

Only the model is made up: both groups lay their layer over the same bytes, as vLLM does, and every KV that a step would
attend to is compared with what it must be. A block copied for the wrong group, or too late, fails at once.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, SlidingWindowSpec

from dynamo_connectors.transfer import TransferEngine
from dynamo_connectors.vllm.groups import group_of
from tests.vllm.simulated_engine import BLOCK, LAYERS, Mode, SimulatedEngine, SimulatedWorker, Step, Truth
from tests.vllm.version_scenario import engine_config

SHAPE: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
WINDOW = 3 * BLOCK
HBM_BLOCKS = 40


class HybridWorker(SimulatedWorker):
    def allocate(self, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return dict.fromkeys(LAYERS, torch.full(shape, -1.0))

    def _forward(self, step: Step, truths: dict[str, Truth]) -> None:
        for request_id, scheduled in step.output.num_scheduled_tokens.items():
            numbers, start = truths[request_id].numbers, step.computed[request_id]
            for group, table in enumerate(step.tables[request_id]):
                for position in range(max(0, start - WINDOW + 1) if group else 0, start):
                    self.assert_token(group, table[position // BLOCK], position % BLOCK, numbers[position])
                for position in range(start, start + scheduled):
                    self.kv[LAYERS[0]][table[position // BLOCK], :, position % BLOCK] = numbers[position] + group

    def assert_token(self, group: int, block: int, place: int, number: float) -> None:
        assert block != 0, "a token is attended to whose block is gone"
        found = self.kv[LAYERS[0]][block, 0, place]
        assert (found == number + group).all(), f"group {group}, block {block}: {found[0]} instead of {number + group}"


class HybridEngine(SimulatedEngine):
    worker_class = HybridWorker
    groups = (
        KVCacheGroupSpec([LAYERS[0]], FullAttentionSpec(**SHAPE)),
        KVCacheGroupSpec([LAYERS[1]], SlidingWindowSpec(**SHAPE, sliding_window=WINDOW)),
    )

    def table_of(self, request_id: str) -> Any:
        return self.scheduler.kv_cache_manager.get_block_ids(request_id)

    def assert_stored(self, worker: SimulatedWorker, item: Any) -> None:
        assert isinstance(worker, HybridWorker)
        group = group_of(item.key, 2)
        for place, number in enumerate(self._block_numbers[item.key.rpartition(b"/")[0]]):
            worker.assert_token(group, item.block, place, number)


def prompt(seed: int, tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(500) for _ in range(tokens)]


@pytest.fixture(params=[Mode("plain"), Mode("async", async_scheduling=True), Mode("two workers", workers=2)])
def engine(request: pytest.FixtureRequest, tiny_model: Any) -> Any:
    flags = ["--kv-connector", "dynamo", "--kvbm-host-dram-gb", "0.004", "--kvbm-load-gate", "off"]
    engine = HybridEngine(engine_config(str(tiny_model), *flags), request.param, HBM_BLOCKS)
    yield engine
    engine.close()


def serve(engine: HybridEngine, name: str, text: list[int], answer_tokens: int = 3) -> None:
    engine.submit(name, text, answer_tokens)
    engine.run()
    engine.expect_answer(name)
    assert len(engine.answers[name]) == answer_tokens


def evict(engine: HybridEngine, name: str) -> None:
    for number in range(4):
        serve(engine, f"{name}-filler-{number}", prompt(9000 + number, 12 * BLOCK))


def test_an_evicted_prefix_comes_back_right_in_every_group(engine: HybridEngine) -> None:
    text = prompt(1, 9 * BLOCK + 5)
    serve(engine, "cold", text)
    evict(engine, "hit")
    before = engine.planned["loads"]
    serve(engine, "hit", text)
    # Nine blocks of full attention, and the three that the window reaches.
    assert engine.planned["loads"] - before == 9 + 3
    evict(engine, "shorter")
    before = engine.planned["loads"]
    serve(engine, "shorter", text[: 5 * BLOCK] + prompt(2, BLOCK))
    assert engine.planned["loads"] - before == 5 + 3


def test_a_load_that_fails_is_computed_from_the_start(engine: HybridEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    text = prompt(1, 9 * BLOCK + 5)
    serve(engine, "cold", text)
    evict(engine, "fails")
    load = TransferEngine._load

    def damaged(self: TransferEngine, job: Any, *rest: Any) -> Any:
        outcome = load(self, job, *rest)
        outcome.failed[job.items[-1].key] = "made_up"
        return outcome

    with monkeypatch.context() as patch:
        patch.setattr(TransferEngine, "_load", damaged)
        serve(engine, "fails", text)
    evict(engine, "again")
    serve(engine, "again", text)


def test_random_traffic_never_reads_a_wrong_byte(engine: HybridEngine) -> None:
    rng = random.Random(7)
    shared = [prompt(seed, 6 * BLOCK) for seed in range(4)]
    names = []
    for number in range(40):
        text = rng.choice(shared)[: rng.randrange(BLOCK, 6 * BLOCK)] + prompt(100 + number % 6, rng.randrange(1, 60))
        names.append(f"r{number}")
        engine.submit(names[-1], text, rng.randrange(1, 40))
        for _ in range(rng.randrange(6)):
            engine.step()
        if rng.random() < 0.2:
            engine.abort(rng.choice(names))
    engine.run()
    for name in names:
        engine.expect_answer(name)
    pool = engine.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "HBM blocks are still in use"
    assert engine.planned["loads"] > 0
