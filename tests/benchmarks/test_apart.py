"""The bench of prefill and decode apart: its parts on made-up engines, and what its table makes of raw figures."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from aiohttp import web

from benchmarks import gpu_disaggregation as bench
from benchmarks.gpu_engine import Schedule
from benchmarks.served import apart, apart_table
from benchmarks.served.client import EngineClient, session
from benchmarks.served.record import Record, read
from benchmarks.served.routes import Aggregated, Apart, Route

TICKET = {"remote_engine_id": "one"}
SMALL = replace(
    apart.TINY, lengths=(64, 96), load_seconds=0.4, drain_seconds=60.0,
    long_per_second=10.0, short_per_second=20.0, stream_tokens=100_000,
    equal_prompts=2,
)  # fmt: skip


class Engine:
    """Answers with the tokens 1, 2, 3 ... and keeps what it was asked."""

    def __init__(self, refuses: bool = False) -> None:
        self.asked: list[dict[str, Any]] = []
        self.refuses = refuses

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        if self.refuses:
            raise web.HTTPInternalServerError
        if not body.get("stream"):
            return web.json_response({"choices": [{}], "kv_transfer_params": TICKET})
        answer = web.StreamResponse()
        await answer.prepare(request)
        for token in range(body["max_tokens"]):
            await answer.write(b"data: " + json.dumps({"choices": [{"token_ids": [token + 1]}]}).encode() + b"\n\n")
            await asyncio.sleep(0.001)
        await answer.write(b"data: [DONE]\n\n")
        return answer

    async def metrics(self, _: web.Request) -> web.Response:
        read_bytes = 4096.0 * len(self.asked)
        return web.Response(text=f"# TYPE dynamo_nixl_read_bytes counter\ndynamo_nixl_read_bytes_total {read_bytes}\n")


@asynccontextmanager
async def clients(*engines: Engine) -> AsyncIterator[list[EngineClient]]:
    async with AsyncExitStack() as stack:
        asking = await stack.enter_async_context(session())
        found = []
        for number, engine in enumerate(engines):
            app = web.Application(client_max_size=1 << 24)
            app.router.add_post("/v1/completions", engine.complete)
            app.router.add_get("/metrics", engine.metrics)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            found.append(EngineClient(f"engine{number}", f"http://127.0.0.1:{runner.addresses[0][1]}", asking))
        yield found


def run_parts(path: Path, engines: list[Engine]) -> list[dict[str, Any]]:
    record = Record(path)
    record.note("size", token_bytes=2048, block_tokens=SMALL.block_tokens)

    async def run() -> None:
        async with clients(*engines) as found:
            arms: list[Route] = [Aggregated("two", found[:2]), Apart("dynamo", found[2], found[3])]
            await bench.parts(arms, SMALL, Schedule(record, (), time.monotonic() + 300.0), tiny=True)

    asyncio.run(run())
    record.close()
    return read(path)


def test_every_part_of_every_arm_is_measured(tmp_path: Path) -> None:
    engines = [Engine() for _ in range(4)]
    facts = run_parts(tmp_path / "raw", engines)
    assert [fact for fact in facts if fact["part"] == "failure"] == []
    seen = {(fact["part"], fact["arm"]) for fact in facts if "arm" in fact}
    measured = {(part, arm) for part in ("sweep", "beside", "load", "equal") for arm in ("two", "dynamo")}
    assert measured | {("load", "dynamo, long only")} <= seen
    assert all(fact["failed"] == 0 for fact in facts if fact["part"] == "load_gaps")
    told = apart_table.text(facts)
    assert "dynamo: 2 of 2 answers equal" in told
    assert "nixl_read_bytes_total=" in told


def test_a_ticket_of_the_prefill_engine_reaches_the_decode_engine(tmp_path: Path) -> None:
    engines = [Engine() for _ in range(4)]
    run_parts(tmp_path / "raw", engines)
    first, second, prefill, decode = (engine.asked for engine in engines)
    assert all(body["kv_transfer_params"]["do_remote_decode"] and body["max_tokens"] == 1 for body in prefill)
    handed = [body["prompt"] for body in decode if body.get("kv_transfer_params") == TICKET]
    assert [body["prompt"] for body in prefill] == handed
    assert not any("kv_transfer_params" in body for body in (*first, *second))
    assert first
    assert second


def test_an_arm_that_serves_nothing_costs_the_others_nothing(tmp_path: Path) -> None:
    facts = run_parts(tmp_path / "raw", [Engine(), Engine(), Engine(refuses=True), Engine()])
    assert [fact["what"] for fact in facts if fact["part"] == "failure"] == ["warm dynamo"]
    assert {fact["arm"] for fact in facts if fact["part"] == "load"} == {"two"}
    assert "FAILED warm dynamo" in apart_table.text(facts)


def test_every_arm_meets_the_same_arrivals() -> None:
    assert apart.arrivals(apart.H200, 1) == apart.arrivals(apart.H200, 1)
    assert apart.arrivals(apart.H200, 1) != apart.arrivals(apart.H200, 2)
    long = [each for each in apart.arrivals(apart.H200, 1) if each.kind == "long"]
    assert 20 < len(long) < 70


def test_a_silence_counts_when_it_overlaps_the_window() -> None:
    seen = [0.0, 0.1, 0.2, 1.2, 1.3]
    assert apart.worst_gap(seen, 0.5, 0.6) == 1.0
    assert abs(apart.worst_gap(seen, 1.25, 2.0) - 0.1) < 1e-9
    assert apart.worst_gap(seen, 2.0, 3.0) == 0.0
    assert abs(apart.usual_gap(seen, 1.0) - 0.1) < 1e-9


def test_quantiles() -> None:
    assert apart_table.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert apart_table.gap_quantile({"80": 99, "900": 1}, 0.5) == 8.0
    assert apart_table.gap_quantile({"80": 99, "900": 1}, 0.995) == 90.0
    assert apart_table.equal_tokens([1, 2, 3], [1, 2, 4]) == 2


def test_a_hand_off_is_what_decode_takes_beyond_a_hit() -> None:
    row = {"arm": "dynamo", "tokens": 1_032, "prompt": 0, "ttft": 0.5, "leg": 0.2, "decode_ttft": 0.3, "hbm": 0.1}
    told = apart_table.text([{"part": "size", "token_bytes": 1_000, "block_tokens": 16}, {"part": "sweep", **row}])
    # 64 blocks of 16 tokens in 200 ms: what is behind the last whole block is not handed over.
    assert "     200.0    0.0" in told
    assert f"{1_024 * 1_000 / 0.2 / 1e9:.4f}" == "0.0051"
