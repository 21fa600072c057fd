"""What the proxy tells of itself: receipts for clients that ask, a line per request, and what engines take."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from dynamo_proxy.access_log import Ended, LogFile, RequestLog
from dynamo_proxy.errors import ConfigError

from tests.proxy.proxy_fakes import (
    Client,
    FakeEngine,
    RawEngine,
    answer_ok,
    ask,
    chat,
    post,
    proxy_before,
    run,
    wait_until,
)
from tests.proxy.test_proxy_cli import ENGINE, call

ROUTE = "/v1/chat/completions"
LONG = "the same long prompt " * 100


def test_a_client_that_asks_is_told_why() -> None:
    async def body() -> None:
        first, second = await FakeEngine().start(), await FakeEngine().start()
        async with proxy_before(first, second) as proxy:
            request = post(ROUTE, chat(LONG, stream=True), "x-dynamo-route: 1")
            receipts = [json.loads((await ask(proxy.port, request)).headers["x-dynamo-route"]) for _ in range(3)]
            assert len({receipt["engine"] for receipt in receipts}) == 1
            assert receipts[0]["matched_tokens"] == 0
            assert (
                receipts[2]["hbm_tokens"] >= receipts[2]["matched_tokens"] > 400
            )  # the end of a text is a part of a block
            assert [receipts[2][f"{tier}_tokens"] for tier in ("host", "disk", "object", "peer")] == [0] * 4
            assert (receipts[2]["mode"], receipts[2]["reason"], receipts[2]["attempts"]) == ("kv", "prefix", 1)
            assert 0 < receipts[2]["predicted_ttft_ms"] < receipts[0]["predicted_ttft_ms"]
            assert 0 <= receipts[2]["actual_ttft_ms"] <= receipts[2]["total_ttft_ms"]
            assert str(first.port) not in repr(receipts)
            for headers in ([], ["x-dynamo-route: 0"]):
                answer = await ask(proxy.port, post(ROUTE, chat(), *headers))
                assert "x-dynamo-route" not in answer.headers
            assert not any("x-dynamo-route" in map(str.lower, headers) for _, headers, _ in first.requests)

    run(body())


def test_no_engine_holds_more_of_a_prompt_than_there_is() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy:
            for prompt in ("hi", LONG):
                request = post("/v1/completions", {"prompt": prompt}, "x-dynamo-route: 1")
                answers = [await ask(proxy.port, request) for _ in range(2)]
                receipt = json.loads(answers[1].headers["x-dynamo-route"])
                assert receipt["hbm_tokens"] == receipt["prompt_tokens"] > 0

    run(body())


def test_a_receipt_counts_the_engines_that_failed_before() -> None:
    async def body() -> None:
        bad, good = await FakeEngine().start(), await RawEngine(answer_ok).start()
        bad.status = 503
        async with proxy_before(bad, good, router_mode="round-robin") as proxy:
            answer = await ask(proxy.port, post(ROUTE, chat(), "X-Dynamo-Route: yes"))
            assert json.loads(answer.headers["x-dynamo-route"])["attempts"] == 2

    run(body())


def test_every_request_leaves_one_line(tmp_path: Path) -> None:
    path = tmp_path / "log"

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine, access_log=str(path)) as proxy:
            await ask(proxy.port, post(ROUTE, chat(LONG)))
            await ask(proxy.port, post(ROUTE, {**chat(), "model": "none"}))
            await wait_until(lambda: len(lines()) == 2, "the lines are written while it runs")
            await ask(proxy.port, post(ROUTE, chat()))
        served, refused, _ = lines()  # the last one at the end
        assert (served["status"], served["engine"], served["model"], served["end"]) == (200, "engine-0", "tiny", "ok")
        assert served["seconds"] >= 0
        assert served["time"] > 1e9
        assert (refused["status"], refused["end"], "engine" in refused) == (404, "model_not_found", False)

    run(body())


def test_a_request_that_the_end_of_the_proxy_cuts_is_counted_and_told(tmp_path: Path) -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        engine.hold = asyncio.Event()
        log = tmp_path / "log"
        async with proxy_before(engine, access_log=str(log)) as proxy, Client.to(proxy.port) as client:
            client.send(post(ROUTE, chat(stream=True)))
            await client.head()
            assert not await proxy.drain(0.01)
            await proxy.close()
            assert proxy.metrics.tallies.requests == {(ROUTE, 503, "shutdown"): 1}
            (line,) = map(json.loads, log.read_text().splitlines())
            assert (line["status"], line["end"], line["engine"]) == (503, "shutdown", "engine-0")
            await wait_until(lambda: engine.active == 0, "the engine stops")

    run(body())


def test_a_log_that_falls_behind_drops_lines_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_proxy.access_log._MAX_WAITING", 3)

    async def body() -> None:
        log = RequestLog(LogFile(str(tmp_path / "log")))
        for _ in range(5):
            log.add(ROUTE, "m", Ended(200, "ok", 0.1), None, b"")
        log.check()
        await log.close()
        written = (tmp_path / "log").read_text().splitlines()
        assert len(written) == 4
        assert json.loads(written[-1]) == {"dropped": 2}

    run(body())


def test_a_log_that_cannot_be_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--access-log"):
        LogFile(str(tmp_path / "none" / "log"))
    code, stderr = call(*ENGINE, "--access-log", str(tmp_path / "none" / "log"), "--port", "0", "--admin-port", "0")
    assert (code, stderr.count("\n")) == (2, 1), stderr


def test_first_tokens_are_timed_by_engine() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy:
            await ask(proxy.port, post(ROUTE, chat(stream=True)))
            await ask(proxy.port, post(ROUTE, chat()))
            page = proxy.front_end.metrics()
            assert b'dynamo_worker_prefill_latency_ms_count{engine="engine-0"} 1.0' in page
            assert b'dynamo_worker_prefill_latency_ms_bucket{engine="engine-0",le="5000.0"} 1.0' in page
            await proxy.remove_engine(proxy.registry.at(0))
            assert b'latency_ms_count{engine="engine-0"}' not in proxy.front_end.metrics()

    run(body())
