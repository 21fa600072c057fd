"""Scale to zero and back on a real vLLM, with the dynamo-planner and dynamo-proxy commands and nothing replaced."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from planner_sidecar.engines.stand import BOOT_SECONDS, Stand, engine_command, stand
from tools.vllm_server import MODEL_NAME

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3000)]


async def ask_until_answered(here: Stand, waits: list[str]) -> dict[str, Any]:
    """As a client does that heeds Retry-After."""
    body = {"model": MODEL_NAME, "prompt": list(range(5, 45)), "max_tokens": 8, "ignore_eos": True}
    end = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < end:
        async with here.session.post(here.proxy + "/v1/completions", json=body) as answer:
            if answer.status == 200:
                return dict(await answer.json())
            assert answer.status == 503, await answer.text()
            waits.append(answer.headers["Retry-After"])
        await asyncio.sleep(float(waits[-1]))
    raise AssertionError("the request was never answered")


def test_a_request_wakes_a_sleeping_pool_and_is_answered(tiny_model: Path, tmp_path: Path) -> None:
    async def story() -> None:
        settings = {"engine-command": engine_command(tiny_model), "scale-to-zero-seconds": 15, "max-replicas": 2}
        async with stand(tmp_path, settings) as here:

            async def sleeps() -> bool:
                return here.lines("decision")[-1:] != [] and await here.engines() == []

            await here.until(sleeps, "sleep")
            assert {entry["decision"]["reason"] for entry in here.lines("decision")} == {"asleep"}
            waits: list[str] = []
            answers = await asyncio.gather(*(ask_until_answered(here, waits) for _ in range(4)))
            assert [answer["usage"]["completion_tokens"] for answer in answers] == [8] * 4
            assert waits, "they came while nothing ran"
            reasons = [entry["decision"]["reason"] for entry in here.lines("decision")]
            assert reasons.count("wake") == 1, "one start for four that wait"

            async def stopped() -> bool:
                return here.happened("stopped") == 1 and await here.engines() == []

            await here.until(stopped, "sleep again")
            assert here.happened("failed") == 0

    asyncio.run(story())
