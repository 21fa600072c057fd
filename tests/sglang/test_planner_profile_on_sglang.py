"""`dynamo-planner profile` on a real SGLang, and what the planner's observer reads of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest
from dynamo_planner.cli import main
from dynamo_planner.exposition import EngineReading
from dynamo_planner.peers import Peers
from dynamo_planner.profile_file import models, read_profile
from dynamo_planner.step_model import coefficients, predict

from tests.sglang.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]


def test_a_real_sglang_is_measured(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    asked = ["--prompt-tokens", "32,128,400,100000", "--batches", "1", "--output-tokens", "128"]
    assert main(["profile", "--engine", server.process.url, "--out", str(out), *asked]) == 0
    profile = read_profile(out)
    assert [tokens for tokens, _ in profile.prefill] == [32, 128, 400], "the engine refuses 100,000 tokens"
    assert [batch for batch, *_ in profile.decode] == [1]
    assert all(0 < kv < 1 for _, kv, _ in profile.decode), "KV use is read off the engine while it runs"
    prefill = coefficients(models(profile)[0])
    assert prefill is not None
    assert predict(prefill, (1.0, 400.0)) > 0 < profile.decode[0][2]
    assert out.with_suffix(".html").read_text().count("<svg") == 2


def test_everything_the_sizing_rests_on_is_read(server: Server) -> None:
    async def read() -> EngineReading:
        async with aiohttp.ClientSession() as session:
            return await Peers(session, 30.0).scrape(server.process.url)

    server.generate(list(range(10, 90)))
    seen = asyncio.run(read())
    assert seen.dialect == "sglang"
    assert seen.kv_usage is not None
    assert seen.prompt_tokens_total
    assert seen.generation_tokens_total
    for histogram in (seen.ttft, seen.itl, seen.queue_wait):
        assert histogram is not None
        assert histogram.buckets
    assert seen.ttft is not None
    assert seen.ttft.count > 0
