"""Prefill and decode pools of real local engines under dynamo-planner and dynamo-proxy, nothing replaced:
`make test-planner-engines` runs this. One pool goes up and down under load, then the other, and nothing is lost. Four
boots on a CPU take minutes, so this is not part of the suite; tests/vllm/test_planner_wakes.py is.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from planner_sidecar.engines.load import Load
from planner_sidecar.engines.stand import Stand, engine_command, stand
from tools.server_process import free_port
from tools.tiny_model import make_model


@pytest.mark.timeout(3000)
def test_two_pools_of_real_engines_are_sized_apart_and_lose_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        model = make_model(tmp_path / "model")
        ours = ("--kv-connector", "dynamo", "--kvbm-host-dram-gb", "0.02", "--kvbm-load-gate", "off", "--kvbm-role")
        ports = {role: free_port() for role in ("prefill", "decode")}
        pools = {
            "prefill": {
                "engine-command": engine_command(model, *ours, "prefill", "--kvbm-peer-port", "{port+1000}"),
                "target-ttft-ms": 60_000,
            },
            "decode": {"engine-command": engine_command(model, *ours, "decode"), "target-itl-ms": 10_000},
        }
        for role, pool in pools.items():
            more = {"role": role, "optimization-target": "sla", "stabilisation-seconds": 86_400, "max-replicas": 2}
            pool |= more | {"engine-port-range": f"{ports[role]}-{ports[role] + 9}"}
        async with stand(tmp_path, {"pools": pools, "max-gpus": 4}) as here:
            await here.until(lambda: here.has(prefill=1, decode=1), "one engine in each pool")
            load = Load(here.session, here.proxy)
            clients = [asyncio.create_task(load.client(number)) for number in range(3)]

            async def hands_over() -> bool:
                return await here.counted("dynamo_router_prefill_legs_total") >= 3

            await here.until(hands_over, "prompts of the prefill pool")
            await up_and_down(here, load, "decode", "prefill")
            await up_and_down(here, load, "prefill", "decode")
            load.is_over = True
            await asyncio.gather(*clients)
            legs = await here.counted("dynamo_router_prefill_legs_total")
            said = f"{load.whole} answers whole, {len(load.bad)} not; {legs:g} prompts computed by the prefill pool"
            sys.stdout.write(said + "\n")
            assert load.bad == []
            assert here.happened("failed") == 0
            last = {entry["pool"]: entry["decision"] for entry in here.lines("decision")}
            assert {pool: decision["current"] for pool, decision in last.items()} == {"prefill": 1, "decode": 1}
            assert "TTFT" in last["prefill"]["explanation"]
            assert "a token" in last["decode"]["explanation"]

    asyncio.run(story())


async def up_and_down(here: Stand, load: Load, pool: str, other: str) -> None:
    """One more in this pool, and one less again."""
    stopped = here.happened("stopped")
    await here.order(pool, 2)
    await here.until(lambda: here.has(**{pool: 2, other: 1}), f"two of {pool}")
    whole = load.whole

    async def has_answered() -> bool:
        return load.whole > whole + 6

    await here.until(has_answered, "answers of the larger pool")
    await here.order(pool, 1)

    async def is_stopped() -> bool:
        return here.happened("stopped") > stopped and await here.has(**{pool: 1, other: 1})

    await here.until(is_stopped, "the end of a drain")
