"""The admin contract that the planner and the demo rely on."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote

import pytest

from tests.proxy.proxy_fakes import Answer, Client, FakeEngine, ask, chat, get, post, proxy_before, run, wait_until


async def admin(port: int, method: str, path: str, body: Any = None) -> Answer:
    request = get(path) if body is None else post(path, body)
    return await ask(port, request.replace(b"GET" if body is None else b"POST", method.encode(), 1))


def test_engines_are_listed_added_drained_resumed_and_removed() -> None:
    async def body() -> None:
        first, second = await FakeEngine().start(), await FakeEngine().start()
        async with proxy_before(first) as proxy:
            port = proxy.admin_port
            for _ in range(2):  # adding twice is adding once
                assert (await admin(port, "POST", "/engines", {"url": second.url + "/"})).status == 200
            await wait_until(lambda: all(engine.takes_requests for engine in proxy.registry))
            await ask(proxy.port, post("/v1/chat/completions", chat("hello " * 50)))
            listing = (await admin(port, "GET", "/engines")).json()
            assert listing["arrivals_total"] == 1
            assert listing["prompt_tokens_total"] > 50
            assert listing["engines"] == [
                {"url": engine.url, "name": name, "role": "", "state": "ready", "was_ready": True, "in_flight": 0,
                 "deadlines": {}, "discovered": False, "knowledge": "approximate", "models": ["tiny"]}
                for engine, name in ((first, "engine-0"), (second, "engine-1"))
            ]  # fmt: skip
            drained = await admin(port, "POST", "/engines/drain", {"url": first.url})
            assert (drained.status, drained.json()["in_flight"]) == (200, 0)
            names = [
                (await ask(proxy.port, post("/v1/chat/completions", chat()))).headers["x-dynamo-engine"]
                for _ in range(4)
            ]
            assert set(names) == {"engine-1"}
            assert (await admin(port, "POST", "/engines/resume", {"url": first.url})).json()["state"] == "ready"
            gone = await admin(port, "DELETE", "/engines?url=" + quote(second.url))
            assert gone.status == 200
            assert (await admin(port, "DELETE", "/engines?url=" + quote(second.url))).status == 404
            assert (await ask(proxy.port, post("/v1/chat/completions", chat()))).headers[
                "x-dynamo-engine"
            ] == "engine-0"
            assert b'engine="engine-1"' not in proxy.front_end.metrics().split(b"in_flight_requests gauge")[1]
            await second.stop()

    run(body())


def test_a_busy_engine_drains_its_streams_and_cannot_be_removed() -> None:
    async def body() -> None:
        busy, other = await FakeEngine().start(), await FakeEngine().start()
        busy.hold = asyncio.Event()
        async with proxy_before(busy) as proxy, Client.to(proxy.port) as client:
            port = proxy.admin_port
            client.send(post("/v1/chat/completions", chat(stream=True)))
            await client.head()
            proxy.add_engine(other.address)
            await wait_until(lambda: proxy.registry.at(1).takes_requests)
            drained = await admin(port, "POST", "/engines/drain", {"url": busy.url})
            assert (drained.json()["in_flight"], drained.json()["state"]) == (1, "draining")
            assert (await admin(port, "DELETE", "/engines?url=" + quote(busy.url))).status == 409
            assert (await ask(proxy.port, post("/v1/chat/completions", chat()))).headers[
                "x-dynamo-engine"
            ] == "engine-1"
            busy.hold.set()
            assert b"".join([chunk async for chunk in client.chunks()]).endswith(b"[DONE]\n\n")
            assert (await admin(port, "DELETE", "/engines?url=" + quote(busy.url))).status == 200
            assert proxy.add_engine(busy.address).slot == 0  # the number is free again
            await other.stop()

    run(body())


def test_an_engine_is_not_added_again_with_other_settings() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before() as proxy:
            for settings, status, code in (
                (",role=decode,idle=7", 200, None),
                ("", 200, None),
                (",role=decode", 200, None),
                (",idle=7.0", 200, None),
                (",role=prefill", 409, "other_settings"),
                (",idle=8", 409, "other_settings"),
                (",connect=1", 409, "other_settings"),
            ):
                answer = await admin(proxy.admin_port, "POST", "/engines", {"url": engine.url + settings})
                assert (answer.status, answer.json().get("error", {}).get("code")) == (status, code), settings
            (known,) = proxy.registry
            assert (known.role, known.timeouts.idle_seconds) == ("decode", 7)
            await engine.stop()

    run(body())


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/engines", b"{", 400),
        ("POST", "/engines", {"uri": "x"}, 400),
        ("POST", "/engines", {"url": "http://127.0.0.1:9", "role": "decode"}, 400),
        ("POST", "/engines", {"url": "ftp://x"}, 400),
        ("POST", "/engines/drain", {"url": "http://127.0.0.1:9"}, 404),
        ("POST", "/engines/resume", {"url": "http://127.0.0.1:9"}, 404),
        ("POST", "/engines/resume", b"", 400),
        ("DELETE", "/engines", None, 400),
        ("DELETE", "/engines?url=http%3A%2F%2F127.0.0.1%3A9", None, 404),
        ("POST", "/router-mode", {"mode": "best"}, 400),
        ("GET", "/nowhere", None, 404),
        ("PUT", "/engines", {}, 405),
    ],
)
def test_mistakes_are_answered_in_json(method: str, path: str, body: Any, status: int) -> None:
    async def work() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine) as proxy:
            answer = await admin(proxy.admin_port, method, path, body)
            assert answer.status == status
            assert answer.json()["error"]["message"]

    run(work())


def test_the_router_mode_changes_while_running() -> None:
    async def body() -> None:
        engines = [await FakeEngine().start(), await FakeEngine().start()]
        async with proxy_before(*engines) as proxy:
            request = post("/v1/chat/completions", chat("the same long prompt " * 100))
            kv = [(await ask(proxy.port, request)).headers for _ in range(6)]
            assert len({headers["x-dynamo-engine"] for headers in kv}) == 1
            assert int(kv[-1]["x-dynamo-matched-tokens"]) > 400
            assert (await admin(proxy.admin_port, "POST", "/router-mode", {"mode": "round-robin"})).json() == {
                "mode": "round-robin"
            }
            turns = [(await ask(proxy.port, request)).headers["x-dynamo-engine"] for _ in range(4)]
            assert set(turns) == {"engine-0", "engine-1"}
            for mode in ("random", "least-loaded"):
                await admin(proxy.admin_port, "POST", "/router-mode", {"mode": mode})
                assert (await ask(proxy.port, request)).status == 200
            assert (await admin(proxy.admin_port, "GET", "/router-mode")).json() == {"mode": "least-loaded"}

    run(body())
