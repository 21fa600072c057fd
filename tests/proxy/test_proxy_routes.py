"""The proxy's own routes, its errors as OpenAI clients read them, and the official client through it."""

from __future__ import annotations

import asyncio

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.proxy.proxy_fakes import Client, FakeEngine, ask, chat, get, post, proxy_before, run, wait_until


def test_models_are_merged_and_each_is_listed_once() -> None:
    async def body() -> None:
        engines = [await FakeEngine(("a", "shared")).start(), await FakeEngine(("b", "shared")).start()]
        async with proxy_before(*engines) as proxy:
            listing = (await ask(proxy.port, get("/v1/models"))).json()
            assert listing["object"] == "list"
            assert [entry["id"] for entry in listing["data"]] == ["a", "shared", "b"]
            for model, engine in (("a", "engine-0"), ("b", "engine-1")):
                for _ in range(3):
                    answer = await ask(proxy.port, post("/v1/chat/completions", chat(model=model)))
                    assert answer.headers["x-dynamo-engine"] == engine
            answer = await ask(proxy.port, post("/v1/chat/completions", chat(model="nope")))
            assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found")

    run(body())


@pytest.mark.parametrize("payload", [b"{", b"", b"[1]", b'"x"', b"\xff", b'{"model": 5}', b"[" * 100_000])
def test_malformed_json_is_the_clients_mistake(payload: bytes) -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy, Client.to(proxy.port) as client:
            client.send(post("/v1/chat/completions", payload))
            answer = await client.answer()
            error = answer.json()["error"]
            assert (answer.status, error["type"]) == (400, "invalid_request_error")
            assert error["code"] in ("invalid_json", "invalid_model")
            assert error["message"]
            client.send(get("/health"))
            assert (await client.answer()).status == 200
            assert not engine.requests

    run(body())


def test_without_a_ready_engine_the_answer_is_503_and_later_200() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        await engine.stop()
        async with proxy_before(engine, ready=False) as proxy:
            health = await ask(proxy.port, get("/health"))
            assert (health.status, health.json()["engines"][0]["state"]) == (503, "starting")
            answer = await ask(proxy.port, post("/v1/chat/completions", chat()))
            assert (answer.status, answer.headers["retry-after"]) == (503, "2")
            assert answer.json()["error"]["code"] == "no_engine_ready"
            await engine.start(engine.port)
            await wait_until(proxy.registry.any_ready)
            assert (await ask(proxy.port, get("/health"))).status == 200
            assert (await ask(proxy.port, post("/v1/chat/completions", chat()))).status == 200

    run(body())


def test_a_dead_engine_leaves_the_ready_set_and_comes_back() -> None:
    async def body() -> None:
        engines = [await FakeEngine().start(), await FakeEngine().start()]
        async with proxy_before(*engines) as proxy:
            await engines[0].stop()
            for _ in range(6):
                answer = await ask(proxy.port, post("/v1/chat/completions", chat()))
                assert (answer.status, answer.headers["x-dynamo-engine"]) == (200, "engine-1")
            await wait_until(lambda: proxy.registry.at(0).state == "down")
            await engines[0].start(engines[0].port)
            await wait_until(lambda: proxy.registry.at(0).state == "ready")

    run(body())


def test_an_unhealthy_answer_takes_three_probes() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy:
            engine.healthy = False
            await wait_until(lambda: proxy.registry.at(0).state == "down")
            assert b'dynamo_router_probe_failures_total{engine="engine-0",reason="status_503"} 3.0' in (
                proxy.front_end.metrics()
            )
            engine.healthy = True
            await wait_until(lambda: proxy.registry.at(0).state == "ready")

    run(body())


def test_metrics_are_prometheus_text_with_the_promised_names() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy:
            for _ in range(3):
                await ask(proxy.port, post("/v1/chat/completions", chat("same words " * 200)))
            await ask(proxy.port, post("/v1/chat/completions", b"{"))
            answer = await ask(proxy.port, get("/metrics"))
            assert answer.headers["content-type"].startswith("text/plain")
            samples = {
                (sample.name, tuple(sorted(sample.labels.items()))): sample.value
                for family in text_string_to_metric_families(answer.body.decode())
                for sample in family.samples
            }
            name, route = "dynamo_frontend_requests_total", ("endpoint", "/v1/chat/completions")
            assert samples[name, (route, ("reason", "ok"), ("status", "200"))] == 3
            assert samples[name, (route, ("reason", "invalid_json"), ("status", "400"))] == 1
            assert samples["dynamo_router_arrivals_total", ()] == 3
            assert samples["dynamo_frontend_time_to_first_token_seconds_count", ()] == 3
            assert 0.5 < samples["dynamo_router_kv_cache_hit_ratio", ()] < 0.7
            assert samples["dynamo_router_in_flight_requests", (("engine", "engine-0"),)] == 0

    run(body())


def test_the_openapi_document_is_true() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy:
            document = (await ask(proxy.port, get("/openapi.json"))).json()
            assert document["openapi"].startswith("3.")
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    request = get(path) if method == "get" else post(path, chat())
                    answer = await ask(proxy.port, request)
                    assert str(answer.status) in operation["responses"], (path, answer.status)
                    media = operation["responses"][str(answer.status)]["content"]
                    assert answer.headers["content-type"].split(";")[0] in media, path
            answer = await ask(proxy.port, post("/health", {}))
            assert answer.status == 405
            assert answer.headers["allow"] == "GET, HEAD"

    run(body())


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "GET", "PUT", "DELETE"])
def test_methods_that_a_route_does_not_have_reach_no_engine(method: str) -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy:
            request = post("/v1/chat/completions", chat()).replace(b"POST", method.encode(), 1)
            answer = await ask(proxy.port, request)
            assert (answer.status, answer.headers["allow"]) == (405, "POST")
            assert (await ask(proxy.port, request.replace(b"/v1/chat/completions", b"/other"))).status == (
                405 if method in ("TRACE", "CONNECT") else 200
            )
            assert all(path == "/other" for path, _, _ in engine.requests)

    run(body())


def test_head_requests_get_no_body_and_other_routes_pass() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy, Client.to(proxy.port) as client:
            client.send(get("/health").replace(b"GET", b"HEAD"))
            assert (await client.head()).status == 200
            client.send(get("/version?x=1") + post("/v1/audio/speech", b"not json at all"))
            assert (await client.answer()).status == 200
            assert (await client.answer()).status == 200
            assert [path for path, _, _ in engine.requests] == ["/version", "/v1/audio/speech"]

    run(body())


def test_the_official_client_lists_answers_streams_and_reads_errors() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy:
            url = f"http://127.0.0.1:{proxy.port}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0) as client:
                assert [model.id async for model in client.models.list()] == ["tiny"]
                messages = [{"role": "user", "content": "hi"}]
                whole = await client.chat.completions.create(model="tiny", messages=messages)  # type: ignore[arg-type]
                assert whole.choices[0].message.content == "hello"
                stream = await client.chat.completions.create(  # type: ignore[call-overload]
                    model="tiny", messages=messages, stream=True
                )
                words = [chunk.choices[0].delta.content async for chunk in stream]
                assert words == ["word0 ", "word1 ", "word2 "]
                with pytest.raises(openai.NotFoundError, match="does not exist"):
                    await client.chat.completions.create(model="none", messages=messages)  # type: ignore[arg-type]

    run(body())


def test_the_official_client_that_stops_reading_frees_the_engine() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        engine.hold = asyncio.Event()
        async with proxy_before(engine) as proxy:
            url = f"http://127.0.0.1:{proxy.port}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0) as client:
                stream = await client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True
                )
                async for _ in stream:
                    break
                assert engine.active == 1
                await stream.close()
                await wait_until(lambda: engine.active == 0, "engine aborted")
                await wait_until(lambda: proxy.ledger.in_flight == 0)

    run(body())
