"""What every supported vLLM has to do with our connector. A program: `python -m tests.vllm.version_scenario MODEL`.

It runs in an interpreter of its own, because one interpreter holds one vLLM. It prints one line per part that passed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import vllm
from prometheus_client import REGISTRY
from vllm.distributed.kv_events import BlockStored
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorProm
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils import hashing
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import RequestStatus

from dynamo_connectors.jobs import LoadJob
from dynamo_connectors.transfer import TransferEngine
from dynamo_connectors.vllm.compat import hashes_end_with_process
from dynamo_connectors.vllm.connector import DynamoConnector
from tests.vllm.by_layers_scenario import (
    BY_LAYERS,
    evict_hbm,
    layers_wait_for_their_part,
    prompt,
    waits_are_needed,
    what_is_loaded_whole_comes_at_once,
)
from tests.vllm.late_layers import late_layers, watch_writes
from tests.vllm.simulated_engine import BLOCK, Mode, SimulatedEngine, ours

MODES = (
    Mode("one worker"),
    Mode("two workers", workers=2),
    Mode("async scheduling", async_scheduling=True),
    Mode("draft model", draft_layer=True),
    Mode("V2 runner", v2_runner=True),
    Mode("V2 runner, async scheduling, two workers", async_scheduling=True, v2_runner=True, workers=2),
)
HBM_BLOCKS = 24
ABORTED_IN = (
    RequestStatus.WAITING,
    RequestStatus.WAITING_FOR_REMOTE_KVS,
    RequestStatus.RUNNING,
    RequestStatus.PREEMPTED,
)


def engine_config(model: str, *flags: str) -> Any:
    """Flags to a `VllmConfig`, the way `vllm serve` does it: our plugin adds and translates its own."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    sizes = ["--block-size", str(BLOCK), "--max-model-len", "512", "--max-num-batched-tokens", "64"]
    events = ["--kv-events-config", json.dumps({"enable_kv_cache_events": True, "publisher": "null"})]
    arguments = ["--model", model, "--dtype", "float32", "--enforce-eager", *sizes, *events, *flags]
    return AsyncEngineArgs.from_cli_args(parser.parse_args(arguments)).create_engine_config()


def dynamo_config(model: str) -> Any:
    # 8 KiB a block and worker: some 120 blocks, five times HBM. The load gate would decide by measured times.
    size = ["--kvbm-host-dram-gb", "0.001"]
    config = engine_config(model, "--kv-connector", "dynamo", "--kvbm-load-gate", "off", *size)
    transfer = config.kv_transfer_config
    assert (transfer.kv_connector, transfer.kv_role) == ("dynamo", "kv_both")
    assert transfer.kv_connector_extra_config == {"kvbm_load_gate": "off", "kvbm_host_dram_gb": "0.001"}
    assert transfer.kv_load_failure_policy == "recompute"
    return config


def multi_config(model: str) -> Any:
    settings = {"kvbm_host_dram_gb": 0.001, "kvbm_load_gate": "off"}
    child = {"kv_connector": "dynamo", "kv_role": "kv_both", "kv_connector_extra_config": settings}
    multi = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}
    multi["kv_connector_extra_config"] = {"connectors": [child]}
    return engine_config(model, "--kv-transfer-config", json.dumps(multi))


def assert_nothing_left(engine: SimulatedEngine) -> None:
    pool = engine.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "HBM blocks are still in use"
    for connector in (engine.scheduler.connector, *(worker.connector for worker in engine.workers)):
        dynamo = ours(connector)
        assert isinstance(dynamo, DynamoConnector)
        half = dynamo._scheduler or dynamo._worker
        half.check()
    dynamo = ours(engine.scheduler.connector)
    assert dynamo._scheduler.held_blocks == 0
    assert not dynamo._scheduler.has_work
    assert not dynamo._scheduler._requests, "finished requests are still known"
    assert not dynamo._block_tables._tables, "block tables of finished requests are still kept"


def cold_evicted_and_hit(engine: SimulatedEngine) -> None:
    text = prompt(1, 5 * BLOCK + 9)
    engine.submit("cold", text, 40)
    engine.step_until(lambda: len(engine.answers["cold"]) >= 10)
    assert engine.planned == {"stores": 5, "loads": 0}, "a running request's full blocks are not offloaded"
    engine.run()
    assert engine.planned == {"stores": 6, "loads": 0}, engine.planned
    evict_hbm(engine, "hit")
    before = engine.planned["loads"]
    engine.submit("hit", text, 40)
    engine.run()
    assert engine.planned["loads"] == before + 5
    assert engine.answers["hit"] == engine.answers["cold"]
    assert len(engine.answers["hit"]) == 40
    engine.expect_answer("hit")


def preempted_requests_come_back_right(engine: SimulatedEngine) -> None:
    names = [f"crowd-{index}" for index in range(8)]
    for index, name in enumerate(names):
        engine.submit(name, prompt(50 + index, 2 * BLOCK + 20), 90)
    engine.run()
    assert engine.preemptions > 0
    for name in names:
        engine.expect_answer(name)
        assert len(engine.answers[name]) == 90


def aborted_in_every_state(engine: SimulatedEngine) -> None:
    """Between schedule and the step's result too, which is where vLLM looks at its queue of aborts."""
    text = prompt(2, 4 * BLOCK + 1)
    engine.submit("kept", text, 2)
    engine.run()
    for state in ABORTED_IN:
        for half_a_step in (False, True):
            name = f"leaves-{state.name}-{half_a_step}"
            evict_hbm(engine, name)
            rivals = 5 if state == RequestStatus.PREEMPTED else 1
            for index in range(rivals):
                engine.submit(f"{name}-stays-{index}", prompt(10 + index, 70), 90)
            request = engine.submit(name, text + prompt(3, 3 * BLOCK), 90)
            engine.step_until(lambda request=request, state=state: request.status == state)
            if half_a_step:
                engine.schedule()
            engine.abort(name)
            engine.run()
            assert len(engine.answers[name]) < 90
            for index in range(rivals):
                engine.expect_answer(f"{name}-stays-{index}")
                assert len(engine.answers[f"{name}-stays-{index}"]) == 90


def lost_blocks_are_recomputed(engine: SimulatedEngine) -> None:
    text = prompt(4, 6 * BLOCK + 3)
    engine.submit("whole", text, 8)
    engine.run()
    evict_hbm(engine, "lost")
    worker = engine.workers[-1]
    worker_half, original, spoilt = ours(worker.connector)._worker, TransferEngine.poll, []
    run_ahead = TransferEngine.run_ahead

    def poll(self: TransferEngine, *args: Any, **kwargs: Any) -> Any:
        for report in original(self, *args, **kwargs):
            load = worker_half._loads.get(report.job_id) if self is worker_half._transfers else None
            if load is not None:
                lost = load.items[2]
                spoilt.append(lost.block)
                for tensor in worker.kv.values():
                    tensor[lost.block] = -2.0
                report = dataclasses.replace(report, failed={lost.key: "made_up"})
            yield report

    TransferEngine.poll = poll  # type: ignore[method-assign]
    TransferEngine.run_ahead = lambda *_, **__: False  # type: ignore[method-assign]
    try:
        engine.submit("damaged", text, 8)
        engine.run()
    finally:
        TransferEngine.poll = original  # type: ignore[method-assign]
        TransferEngine.run_ahead = run_ahead  # type: ignore[method-assign]
    assert spoilt
    assert engine.answers["damaged"] == engine.answers["whole"]
    assert any(stats.get("counts", {}).get("load_failures|made_up") for stats in engine.stats)


def runs_ahead_of_its_load(engine: SimulatedEngine) -> None:
    """Alone, a request is computed on while its load is under way. It may be over before the load is."""
    text = prompt(6, 5 * BLOCK + 3)
    engine.submit("behind", text, 8)
    engine.run()
    evict_hbm(engine, "ahead")
    arrive, arrived = TransferEngine._await_arrival, threading.Event()

    def late(self: TransferEngine, *args: Any) -> Any:
        assert arrived.wait(60)
        return arrive(self, *args)

    TransferEngine._await_arrival = late  # type: ignore[method-assign]
    try:
        engine.submit("ahead", text, 8)
        engine.step_until(lambda: len(engine.answers["ahead"]) == 8)
        half = ours(engine.scheduler.connector)._scheduler
        assert half._onboarding.loading, "the request waited for the end of its load"
        half.check()
    finally:
        arrived.set()
        TransferEngine._await_arrival = arrive  # type: ignore[method-assign]
    engine.run()
    assert not half._onboarding.loading
    assert engine.answers["ahead"] == engine.answers["behind"]


def runs_ahead_beside_others(engine: SimulatedEngine) -> None:
    """While others are computed, each copy as late as the order allows: when the engine's stream waits for it."""
    half = ours(engine.scheduler.connector)._scheduler
    run_ahead, join = TransferEngine.run_ahead, TransferEngine.join
    waiting: list[tuple[TransferEngine, LoadJob]] = []
    joins = 0

    def later(self: TransferEngine, job: LoadJob, beside: Any = None, by_layers: bool = False) -> bool:
        if beside is None:
            return run_ahead(self, job)
        waiting.append((self, job))
        return True

    def joined(self: TransferEngine) -> None:
        nonlocal joins
        for place, (owner, job) in reversed(list(enumerate(waiting))):
            if owner is self:
                assert run_ahead(self, job)
                del waiting[place]
                joins += 1
        join(self)

    half._hides_loads = lambda: True
    TransferEngine.run_ahead, TransferEngine.join = later, joined  # type: ignore[assignment, method-assign]
    try:
        random_traffic(engine)
    finally:
        TransferEngine.run_ahead, TransferEngine.join = run_ahead, join  # type: ignore[method-assign]
        del half._hides_loads
    assert joins > 5, "hardly any load ran beside others"
    assert not waiting


def does_not_run_ahead_of_what_is_not_there(engine: SimulatedEngine) -> None:
    text = prompt(7, 5 * BLOCK + 3)
    engine.submit("there", text, 8)
    engine.run()
    evict_hbm(engine, "not-there")
    dram = ours(engine.workers[-1].connector)._worker._transfers._dram
    for slot in range(dram.capacity_blocks):
        dram.set_key(slot, None)
    engine.submit("not-there", text, 8)
    engine.run()
    assert engine.answers["not-there"] == engine.answers["there"]
    assert any(stats.get("counts", {}).get("load_failures|wrong_key") for stats in engine.stats)


def forgets_on_reset(engine: SimulatedEngine) -> None:
    text = prompt(5, 5 * BLOCK)
    engine.submit("before", text, 2)
    engine.run()
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    before = engine.planned["loads"]
    engine.submit("after", text, 2)
    engine.run()
    assert engine.planned["loads"] == before
    assert engine.answers["after"] == engine.answers["before"]


def random_traffic(engine: SimulatedEngine) -> None:
    """Shared prefixes, four times more KV than HBM; aborts and resets at any moment, also while blocks are copied."""
    chance = random.Random(7)
    stems = [prompt(100 + index, chance.randrange(20, 5 * BLOCK)) for index in range(6)]
    waiting = []
    for index in range(60):
        text = chance.choice(stems) + prompt(200 + index % 9, chance.randrange(1, 4 * BLOCK))
        waiting.append((f"random-{index}", text, chance.randrange(1, 60)))
    names = [name for name, _, _ in waiting]
    while waiting:
        for _ in range(chance.randrange(3)):
            if waiting:
                engine.submit(*waiting.pop())
        for _ in range(chance.randrange(6)):
            engine.step()
        live = list(engine.scheduler.requests)
        if live and chance.random() < 0.2:
            engine.abort(chance.choice(live))
        if chance.random() < 0.05:
            engine.scheduler.reset_prefix_cache(reset_connector=True)
        ours(engine.scheduler.connector)._scheduler.check()
    engine.run()
    for name in names:
        engine.expect_answer(name)


def speaks_to_metrics_and_routers(engine: SimulatedEngine, config: Any) -> None:
    prometheus = KVConnectorProm(config, ["engine"], {0: ["0"]})
    logging = KVConnectorLogging(config.kv_transfer_config)
    for stats in engine.stats:
        prometheus.observe(stats)
        logging.observe(stats)
    hits = REGISTRY.get_sample_value("dynamo_kvbm_hit_blocks_total", {"engine": "0", "tier": "host_dram"})
    assert hits
    lines: list[str] = []
    logging.log(lambda text, *args: lines.append(text % args))
    assert "hit_blocks|host_dram" in lines[0]
    stored = [event for event in engine.events if isinstance(event, BlockStored) and event.medium == "CPU"]
    assert stored
    assert all(len(event.token_ids) == BLOCK == event.block_size for event in stored)


def tells_whether_hashes_outlive_the_process() -> None:
    """By what vLLM does: every chain of hashes starts from `NONE_HASH`, which each engine process sets anew."""
    for seed in (None, "0"):
        if seed is None:
            os.environ.pop("PYTHONHASHSEED", None)
        else:
            os.environ["PYTHONHASHSEED"] = seed
        for name, algorithm in (("sha256", hashing.sha256), ("xxhash", hashing.xxhash)):
            starts = set()
            for _ in range(2):
                kv_cache_utils.init_none_hash(algorithm)
                starts.add(kv_cache_utils.NONE_HASH)
            assert hashes_end_with_process(name) == (len(starts) > 1), (seed, name)
    del os.environ["PYTHONHASHSEED"]


PARTS: tuple[Callable[[SimulatedEngine], None], ...] = (
    cold_evicted_and_hit,
    preempted_requests_come_back_right,
    aborted_in_every_state,
    lost_blocks_are_recomputed,
    runs_ahead_of_its_load,
    does_not_run_ahead_of_what_is_not_there,
    forgets_on_reset,
    random_traffic,
    runs_ahead_beside_others,
)


PARTS_BY_LAYERS: tuple[Callable[[SimulatedEngine], None], ...] = (
    cold_evicted_and_hit,
    what_is_loaded_whole_comes_at_once,
    preempted_requests_come_back_right,
    aborted_in_every_state,
    forgets_on_reset,
    layers_wait_for_their_part,
)


def run_parts(config: Any, mode: Mode, parts: Sequence[Callable[[SimulatedEngine], None]]) -> None:
    with late_layers() if mode.by_layers else nullcontext():
        engine = SimulatedEngine(config, mode, HBM_BLOCKS)
        if mode.by_layers:
            watch_writes(engine)
        run_on(engine, mode, parts)


def run_on(engine: SimulatedEngine, mode: Mode, parts: Sequence[Callable[[Any], None]]) -> None:
    """The parts one after another on one engine, which ends with them; each leaves nothing behind."""
    for part in parts:
        part(engine)
        assert_nothing_left(engine)
        print(f"passed: {mode.name}: {getattr(part, 'func', part).__name__}", flush=True)
    engine.close()


def main(model: str) -> None:
    print(f"vllm {vllm.__version__}", flush=True)
    tells_whether_hashes_outlive_the_process()
    first = dynamo_config(model)
    run_parts(first, MODES[0], [*PARTS, partial(speaks_to_metrics_and_routers, config=first)])
    for mode in MODES[1:]:
        run_parts(dynamo_config(model), mode, PARTS)
    for mode in BY_LAYERS:
        run_parts(dynamo_config(model), mode, PARTS_BY_LAYERS)
    waits_are_needed(dynamo_config(model), BY_LAYERS[0], HBM_BLOCKS)
    multi = Mode("a child of MultiConnector", workers=2)
    run_parts(multi_config(model), multi, [cold_evicted_and_hit, aborted_in_every_state])
    print("passed: everything", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
