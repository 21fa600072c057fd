"""`dynamo-planner profile` against an engine that answers as the real ones do, and against ones that do not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from dynamo_planner.cli import main
from dynamo_planner.errors import ObservationError
from dynamo_planner.page import render_profile
from dynamo_planner.profile_engine import EngineProfiler, ProfilePlan
from dynamo_planner.profile_file import Profile

from tests.planner.planner_fakes import served, vllm_text

PLAN = ProfilePlan(prompt_tokens=(8, 64), batches=(1, 3), decode_prompt_tokens=4, output_tokens=3, repeats=2)


class CompletionEngine:
    """Streams as many tokens as were asked for; refuses prompts above `longest`."""

    def __init__(self, longest: int = 1000, streams: bool = True) -> None:
        self.longest = longest
        self.streams = streams
        self.asked: list[tuple[int, int]] = []
        self.running = self.most = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert body["model"] == "tiny"
        assert body["ignore_eos"] is True
        if len(body["prompt"]) > self.longest:
            return web.json_response({"error": "too long"}, status=400)
        self.asked.append((len(body["prompt"]), body["max_tokens"]))
        self.running += 1
        self.most = max(self.most, self.running)
        answer = web.StreamResponse()
        await answer.prepare(request)
        for _ in range(body["max_tokens"] if self.streams else 0):
            await asyncio.sleep(0.01)
            await answer.write(b'data: {"choices": [{"text": "a"}]}\n\n')
        await answer.write(b"data: [DONE]\n\n")
        self.running -= 1
        return answer

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.metrics)
        return app

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny"}]})

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=vllm_text(kv=0.25))


def measured(engine: CompletionEngine, plan: ProfilePlan = PLAN) -> Profile:
    async def story() -> Profile:
        async with served(engine.app()) as url, aiohttp.ClientSession() as session:
            return await EngineProfiler(session, url, plan).run(lambda text: None)

    return asyncio.run(story())


def test_lengths_and_batches_are_measured() -> None:
    engine = CompletionEngine()
    profile = measured(engine)
    assert [tokens for tokens, _ in profile.prefill] == [8, 64]
    assert [(batch, kv) for batch, kv, _ in profile.decode] == [(1, 0.25), (3, 0.25)]
    assert all(seconds > 0 for *_, seconds in (*profile.prefill, *profile.decode))
    assert engine.asked.count((8, 1)) == engine.asked.count((64, 1)) == 2
    assert engine.most == 3
    assert render_profile(profile, "<x>").count("<svg") == 2


def test_a_prompt_that_is_too_long_ends_the_lengths_and_not_the_run() -> None:
    assert [tokens for tokens, _ in measured(CompletionEngine(longest=32)).prefill] == [8]


def test_an_engine_that_refuses_everything_or_does_not_stream_is_told() -> None:
    with pytest.raises(ObservationError, match="answered 400"):
        measured(CompletionEngine(longest=0))
    with pytest.raises(ObservationError, match="streamed no token"):
        measured(CompletionEngine(streams=False))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give --engine URL"),
        (["--engine", "http://127.0.0.1:9"], "cannot be reached"),
        (["--engine", "http://127.0.0.1:9", "--batches", "1,x"], "--batches"),
        (["--engine", "http://127.0.0.1:9", "--output-tokens", "1"], "--output-tokens"),
        (["--bogus"], "--bogus"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["profile", "--out", str(tmp_path / "p.json"), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("dynamo-planner: ")
    assert err.count("\n") == 1
    assert says in err
    assert not (tmp_path / "p.json").exists()
