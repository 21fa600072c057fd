"""Beside another connector, in vLLM's `MultiConnector`: what that one has not brought is never kept as if it had been.

A program, like `version_scenario`: `python -m tests.vllm.beside_others MODEL`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlConnector
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import RequestStatus

from tests.vllm.other_connectors import FailingInStep, SlowRemote
from tests.vllm.simulated_engine import BLOCK, Mode, SimulatedEngine, SimulatedWorker
from tests.vllm.version_scenario import HBM_BLOCKS, engine_config, evict_hbm, prompt, run_on

MODES = (
    Mode("one worker"),
    Mode("async scheduling", async_scheduling=True),
    Mode("V2 runner, async scheduling", async_scheduling=True, v2_runner=True),
)


class Worker(SimulatedWorker):
    def assert_kv(self, table: Any, numbers: Any, what: str, *args: Any) -> None:
        # vLLM computes on what a load within the step did not bring, and throws the result away.
        if not what.startswith(FailingInStep.prefix):
            super().assert_kv(table, numbers, what, *args)


class Engine(SimulatedEngine):
    worker_class = Worker


def beside_config(model: str, other: type, **more: object) -> Any:
    """The other one is asked first, so that it is the one that loads."""
    settings = {"kvbm_host_dram_gb": 0.001, "kvbm_load_gate": "off", **more}
    dynamo = {"kv_connector": "dynamo", "kv_role": "kv_both", "kv_connector_extra_config": settings}
    first = {"kv_connector": other.__name__, "kv_connector_module_path": other.__module__, "kv_role": "kv_both"}
    multi: dict[str, Any] = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}
    multi["kv_connector_extra_config"] = {"connectors": [first, dynamo]}
    return engine_config(model, "--kv-transfer-config", json.dumps(multi))


def leave_old_kv_in_hbm(engine: Engine, name: str) -> None:
    engine.submit(name, prompt(9, 10 * BLOCK), 3)
    engine.run()


def expect_kept(engine: Engine, name: str, text: list[int]) -> None:
    """Twice: computed, or loaded from whatever was kept; and surely loaded. Either way every byte is compared."""
    for again in ("once", "again"):
        evict_hbm(engine, f"{name}-{again}")
        before = engine.planned["loads"]
        engine.submit(f"{name}-{again}", text, 8)
        engine.run()
        engine.expect_answer(f"{name}-{again}")
    assert engine.planned["loads"] > before, "what was computed is not kept"


def aborted_while_another_loads(engine: Engine) -> None:
    text = prompt(1, 4 * BLOCK + 5)
    leave_old_kv_in_hbm(engine, "old")
    request = engine.submit("remote-1", text, 4)
    engine.step_until(lambda: request.status == RequestStatus.WAITING_FOR_REMOTE_KVS)
    assert request.num_computed_tokens == 4 * BLOCK, "vLLM counts no more what is still being loaded"
    before = engine.planned["stores"]
    engine.abort("remote-1")
    for _ in range(10):
        engine.step()
    assert engine.planned["stores"] == before
    SlowRemote.arrived.add("remote-1")
    engine.run()
    expect_kept(engine, "after-remote", text)


def recomputed_after_a_load_within_the_step(engine: Engine) -> None:
    text = prompt(2, 4 * BLOCK + 5)
    leave_old_kv_in_hbm(engine, "old-recomputed")
    # Its answer is vLLM's own affair: with async scheduling 0.32 loses the token of the step that failed.
    engine.submit("in-step-recomputed", text, 4)
    engine.run()
    expect_kept(engine, "after-recomputed", text)


def shared_with_one_that_comes_in_the_next_step(engine: Engine) -> None:
    """It finds in HBM what the failed load left there, if the scheduler is one step ahead of the workers."""
    text = prompt(3, 2 * BLOCK + 5)
    leave_old_kv_in_hbm(engine, "old-shared")
    engine.submit("in-step-first", text, 4)
    engine.schedule()
    engine.submit("in-step-second", text, 4)
    engine.run()
    expect_kept(engine, "after-shared", text)


def aborted_before_the_step_ends(engine: Engine) -> None:
    text = prompt(4, 4 * BLOCK + 5)
    leave_old_kv_in_hbm(engine, "old-aborted")
    before = engine.planned["stores"]
    engine.submit("in-step-aborted", text, 4)
    engine.schedule()
    engine.abort("in-step-aborted")
    engine.run()
    assert engine.planned["stores"] == before
    expect_kept(engine, "after-aborted", text)


def one_layout_with_the_engines_own_connector(model: str) -> None:
    """Two names for the layout that both want would end the engine."""
    config = beside_config(model, NixlConnector, kvbm_role="prefill")
    wanted = MultiConnector.get_required_kvcache_layout(config)
    assert wanted == NixlConnector.get_required_kvcache_layout(config) is not None, wanted


def main(model: str) -> None:
    print(f"vllm {vllm.__version__}", flush=True)
    one_layout_with_the_engines_own_connector(model)
    for mode in MODES:
        run_on(Engine(beside_config(model, SlowRemote), mode, HBM_BLOCKS), mode, (aborted_while_another_loads,))
    in_step = (
        recomputed_after_a_load_within_the_step,
        shared_with_one_that_comes_in_the_next_step,
        aborted_before_the_step_ends,
    )
    # vLLM before 0.29 does not tell of such loads: docs/vllm-versions.md, "On 0.24".
    for mode in MODES if hasattr(SchedulerOutput, "has_sync_kv_loads") else ():
        run_on(Engine(beside_config(model, FailingInStep), mode, HBM_BLOCKS), mode, in_step)
    print("passed: everything", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
