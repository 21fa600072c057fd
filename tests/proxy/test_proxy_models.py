"""Several models behind one proxy: each request goes where its model is served, under whatever name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from dynamo_proxy.config import parse_aliases
from dynamo_proxy.errors import ConfigError
from dynamo_proxy.slo_classes import parse_slo_classes

from tests.proxy.proxy_fakes import FakeEngine, ask, chat, get, post, proxy_before, run
from tests.proxy.token_engine import TokenEngine


def form(model: str) -> bytes:
    return (
        b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n'
        b"content-type: audio/wav\r\n\r\nRIFF\r\n"
        b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\n' + model.encode() + b"\r\n--x--\r\n"
    )


def test_each_model_is_served_by_its_own_pool_whatever_the_route() -> None:
    async def body() -> None:
        small, large = await FakeEngine(("small", "small-lora")).start(), await FakeEngine(("large",)).start()
        async with proxy_before(small, large) as proxy:
            for model, engine in (("small", "engine-0"), ("small-lora", "engine-0"), ("large", "engine-1")):
                for request in (
                    post("/v1/chat/completions", {**chat(), "model": model}),
                    post("/v1/embeddings", {"model": model, "input": "x"}),
                    post("/pooling", {"model": model, "input": "x"}),
                    post("/v1/audio/transcriptions", form(model), "content-type: multipart/form-data; boundary=x"),
                ):
                    for _ in range(3):
                        answer = await ask(proxy.port, request)
                        assert (answer.status, answer.headers["x-dynamo-engine"]) == (200, engine)
            missing = await ask(proxy.port, post("/pooling", {"model": "none", "input": "x"}))
            assert (missing.status, missing.json()["error"]["code"]) == (404, "model_not_found")

    run(body())


def test_models_are_listed_once_each_and_told_one_by_one() -> None:
    async def body() -> None:
        first, second = await FakeEngine(("a", "org/b")).start(), await FakeEngine(("org/b", "c")).start()
        aliases = (("fast", "org/b"), ("gone", "nothing"))
        async with proxy_before(first, second, aliases=aliases) as proxy:
            listing = (await ask(proxy.port, get("/v1/models"))).json()["data"]
            assert [entry["id"] for entry in listing] == ["a", "org/b", "c", "fast"]
            assert listing[-1]["root"] == "org/b"
            for name, status in (("org/b", 200), ("org%2Fb", 200), ("fast", 200), ("gone", 404), ("d", 404)):
                answer = await ask(proxy.port, get(f"/v1/models/{name}"))
                assert answer.status == status, name
            assert answer.json()["error"]["code"] == "model_not_found"
            assert first.requests == second.requests == []

    run(body())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/pooling"])
def test_an_alias_is_the_model_that_it_means(path: str) -> None:
    async def body() -> None:
        engine = await FakeEngine(("llama-8b",)).start()
        async with proxy_before(engine, aliases=(("fast", "llama-8b"),)) as proxy:
            sent: dict[str, Any] = {**chat("naïve ☂"), "model": "fast", "seed": 2**60}
            assert (await ask(proxy.port, post(path, sent))).status == 200
            assert json.loads(engine.requests[0][2]) == {**sent, "model": "llama-8b"}

    run(body())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/pooling"])
def test_a_client_reads_the_name_that_it_used(path: str) -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine, aliases=(("ghost", "gone"),)) as proxy:
            for name in ("ghost", "gone"):
                answer = await ask(proxy.port, post(path, {**chat(), "model": name}))
                assert answer.status == 404
                assert f"The model `{name}` does not exist" in answer.json()["error"]["message"]

    run(body())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/pooling"])
def test_what_is_too_deep_to_be_written_anew_is_the_clients_mistake(path: str) -> None:
    async def body() -> None:
        async with proxy_before(await FakeEngine(("tiny",)).start(), aliases=(("fast", "tiny"),)) as proxy:
            deep = b"[" * 300 + b"]" * 300
            answer = await ask(proxy.port, post(path, b'{"model": "fast", "messages": [], "x": ' + deep + b"}"))
            assert (answer.status, answer.json()["error"]["code"]) == (400, "invalid_json")
            assert "too deeply" in answer.json()["error"]["message"]

    run(body())


@pytest.mark.parametrize("texts", [["x"], ["=m"], ["a="], ["a=a"]])
def test_aliases_that_cannot_work_are_refused(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="NAME=MODEL"):
        parse_aliases(texts)


def test_names_that_are_given_twice_are_told_as_that() -> None:
    with pytest.raises(ConfigError, match="--model-alias a is given twice"):
        parse_aliases(["a=b", "a=c"])
    with pytest.raises(ConfigError, match="--slo-class a is given twice"):
        parse_slo_classes(["a,ttft=1", "a,ttft=2"])


def test_an_alias_streams_on_tape_too() -> None:
    async def body() -> None:
        broken, good = await TokenEngine().start(), await TokenEngine().start()
        broken.break_after = 3
        async with proxy_before(broken, good, aliases=(("fast", "tiny"),), router_mode="round-robin") as proxy:
            asked = {**chat("x", stream=True, max_tokens=6), "model": "fast"}
            answer = await ask(proxy.port, post("/v1/chat/completions", asked))
            assert b"engine_lost" not in answer.body
            assert json.loads(good.requests[0][2])["model"] == "tiny"

    run(body())
