"""Engines that are found, and that go: files, names and Kubernetes, none of them able to take the fleet down."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from dynamo_proxy.config import DiscoverySources, EngineAddress, EngineOptions
from dynamo_proxy.discovery import DnsSource, KubernetesSource
from dynamo_proxy.errors import ConfigError, DiscoveryError
from dynamo_proxy.server import ProxyServer

from tests.proxy.proxy_fakes import Client, FakeEngine, ask, chat, get, post, proxy_before, run, wait_until
from tests.proxy.test_proxy_cli import call, ended, ready, started


def sources(**where: Any) -> DiscoverySources:
    return DiscoverySources(**where, interval_seconds=0.05)


def urls(proxy: ProxyServer) -> set[str]:
    return {engine.address.url for engine in proxy.registry}


def test_a_file_names_engines_and_takes_them_away_again(tmp_path: Path) -> None:
    async def body() -> None:
        first, second = await FakeEngine().start(), await FakeEngine().start()
        path = tmp_path / "engines"
        path.write_text("# none yet\n")
        async with proxy_before(discovery=sources(files=(str(path),))) as proxy:
            assert (await ask(proxy.port, post("/v1/chat/completions", chat()))).status == 503
            path.write_text(f"{first.url},idle=7  # with a deadline\n{second.url}\n")
            await wait_until(lambda: sum(engine.takes_requests for engine in proxy.registry) == 2)
            assert proxy.registry.find(first.address).timeouts.idle_seconds == 7
            for wrong in ("no url at all\n", None):  # spoilt, then gone: nothing changes
                path.write_text(wrong) if wrong is not None else path.unlink()
                await proxy.discovery.turn()
                assert urls(proxy) == {first.url, second.url}
            path.write_text(f"{second.url}\n")
            await wait_until(lambda: urls(proxy) == {second.url})
            assert (await ask(proxy.port, post("/v1/chat/completions", chat()))).status == 200
            await first.stop()
            await second.stop()

    run(body())


def test_an_engine_that_vanishes_finishes_what_it_has_and_may_come_back(tmp_path: Path) -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        engine.hold = asyncio.Event()
        path = tmp_path / "engines"
        path.write_text(engine.url)
        async with (
            proxy_before(discovery=sources(files=(str(path),))) as proxy,
            Client.to(proxy.port) as client,
        ):
            await wait_until(lambda: any(e.takes_requests for e in proxy.registry))
            client.send(post("/v1/chat/completions", chat(stream=True)))
            await client.head()
            path.write_text("# none\n")
            await wait_until(lambda: proxy.registry.find(engine.address).draining, "it drains")
            path.write_text(engine.url)
            await wait_until(lambda: not proxy.registry.find(engine.address).draining, "it is back")
            path.write_text("# none\n")
            await wait_until(lambda: proxy.registry.find(engine.address).draining, "it drains again")
            engine.hold.set()
            assert b"".join([chunk async for chunk in client.chunks()]).endswith(b"[DONE]\n\n")
            await wait_until(lambda: not urls(proxy), "it is removed")
            await engine.stop()

    run(body())


def test_what_a_worker_inherits_stays_until_all_sources_have_spoken(tmp_path: Path) -> None:
    async def body() -> None:
        first, second = await FakeEngine().start(), await FakeEngine().start()
        path = tmp_path / "engines"
        path.write_text("")
        async with proxy_before(discovery=sources(files=(str(path),))) as proxy:
            await proxy.discovery.close()
            for fake in (first, second):
                proxy.add_engine(replace(fake.address, options=EngineOptions(discovered=True)))
            await proxy.discovery.start()
            await proxy.discovery.turn()
            assert urls(proxy) == {first.url, second.url}
            path.write_text(second.url)
            await wait_until(lambda: urls(proxy) == {second.url})
            assert not proxy.registry.find(second.address).draining
            path.write_text("# none\n")
            await wait_until(lambda: not urls(proxy))
            await first.stop()
            await second.stop()

    run(body())


def test_what_an_operator_added_is_not_taken_away(tmp_path: Path) -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        path = tmp_path / "engines"
        path.write_text(engine.url)
        async with proxy_before(engine, discovery=sources(files=(str(path),))) as proxy:
            path.write_text("# none\n")
            await proxy.discovery.turn()
            assert not proxy.registry.find(engine.address).draining

    run(body())


def test_a_file_that_is_empty_for_a_moment_takes_nothing_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        path = tmp_path / "engines"
        path.write_text("\n")
        async with proxy_before(discovery=sources(files=(str(path),))) as proxy:
            path.write_text(engine.url)
            await wait_until(lambda: urls(proxy) == {engine.url})
            path.write_text("")
            for _ in range(3):
                await proxy.discovery.turn()
            assert not proxy.registry.find(engine.address).draining
            await engine.stop()
        told = [record.getMessage() for record in caplog.records if "is empty" in record.getMessage()]
        assert len(told) == 2
        assert all(str(path) in line and "a comment alone" in line for line in told)
        assert ["engines found before stay" in line for line in told] == [False, True]

    run(body())


def test_a_file_that_is_wrong_at_the_start_is_one_line_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "engines"
    for wrong, told in ((None, "No such file"), ("# ours\nhttp://a:1,idle=0\n", "line 2: engine http://a:1: '0'")):
        if wrong is not None:
            path.write_text(wrong)
        code, stderr = call("--engines-file", str(path), "--admin-port", "0")
        assert (code, stderr.count("\n")) == (2, 1), stderr
        assert f"--engines-file {path}: " in stderr
        assert told in stderr


def test_every_address_of_a_name_is_an_engine() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        found = sources(dns=(f"http://localhost:{engine.port}", "http://no-such-name.invalid:1"))
        async with proxy_before(discovery=found) as proxy:
            await wait_until(lambda: any(e.takes_requests for e in proxy.registry))
            assert f"http://127.0.0.1:{engine.port}" in urls(proxy)
            assert (await ask(proxy.port, post("/v1/chat/completions", chat()))).status == 200
            await engine.stop()

    run(body())


class Api:
    """A Kubernetes API server as far as endpoints go."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, str]] = []
        self.url = ""

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Api]:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        self.asked.append((request.path_qs, request.headers.get("authorization", "")))
        for part, answer in self.answers.items():
            if part in request.path:
                return web.json_response(answer)
        return web.json_response({"message": "not here"}, status=404)


SLICES = {
    "items": [
        {
            "ports": [{"name": "http", "port": 8000}, {"name": "metrics", "port": 9000}],
            "endpoints": [
                {"addresses": ["10.0.0.1"], "conditions": {"ready": True}},
                {"addresses": ["10.0.0.2"], "conditions": {"ready": False}},
                {"addresses": ["fd00::3"], "conditions": {}},
            ],
        },
        {"ports": None, "endpoints": None},
    ]
}
ENDPOINTS = {
    "subsets": [
        {
            "addresses": [{"ip": "10.0.0.1"}],
            "notReadyAddresses": [{"ip": "10.0.0.2"}],
            "ports": [{"name": "http", "port": 8000}],
        }
    ]
}


def test_ready_endpoints_of_a_service_are_engines(tmp_path: Path) -> None:
    async def body() -> None:
        (tmp_path / "token").write_text("pod-token\n")
        async with Api().serving() as api:
            api.answers["/endpointslices"] = SLICES
            named = KubernetesSource("llm/vllm:http", api.url, tmp_path)
            assert await named.look() == {EngineAddress("10.0.0.1", 8000), EngineAddress("fd00::3", 8000)}
            assert api.asked == [
                (
                    "/apis/discovery.k8s.io/v1/namespaces/llm/endpointslices?labelSelector=kubernetes.io/service-name=vllm",
                    "Bearer pod-token",
                )
            ]
            numbered = KubernetesSource("llm/vllm:7000", api.url, tmp_path)
            assert EngineAddress("10.0.0.1", 7000) in await numbered.look()
            api.answers = {"/endpoints/vllm": ENDPOINTS}  # a server without slices
            assert await named.look() == {EngineAddress("10.0.0.1", 8000)}
            api.answers = {}  # no such service
            assert await named.look() == frozenset()
        with pytest.raises(DiscoveryError, match="cannot be asked"):
            await named.look()
        with pytest.raises(DiscoveryError, match="--kubernetes-api"):
            await KubernetesSource("llm/vllm:http", "", tmp_path).look()

    run(body())


def test_a_label_or_a_setting_says_the_role_of_a_service(tmp_path: Path) -> None:
    async def body() -> None:
        labelled = {"metadata": {"labels": {"dynamo-connectors/role": "prefill"}}}
        async with Api().serving() as api:
            for path, answer in (("/endpointslices", SLICES["items"][0]), ("/endpoints/vllm", ENDPOINTS)):
                labelled_answer = {**answer, **labelled}
                api.answers = {path: {"items": [labelled_answer]} if path == "/endpointslices" else labelled_answer}
                for setting, role in (("", "prefill"), (",role=decode", "decode")):
                    found = await KubernetesSource(f"llm/vllm:http{setting}", api.url, tmp_path).look()
                    assert {address.options.role for address in found} == {role}
        with pytest.raises(ConfigError, match="role=prefill"):
            KubernetesSource("llm/vllm:http,role=x", "")

    run(body())


def test_every_address_of_a_name_has_its_role() -> None:
    async def body() -> None:
        found = await DnsSource("http://localhost:8000,role=decode").look()
        assert {address.options.role for address in found} == {"decode"}

    run(body())


def test_a_proxy_follows_a_service() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with Api().serving() as api:
            endpoint = {"addresses": ["127.0.0.1"], "conditions": {"ready": True}}
            piece = {"ports": [{"name": "http", "port": engine.port}], "endpoints": [endpoint]}
            api.answers["/endpointslices"] = {"items": [piece]}
            found = sources(services=("llm/vllm:http",), kubernetes_api=api.url)
            async with proxy_before(discovery=found) as proxy:
                await wait_until(lambda: any(e.takes_requests for e in proxy.registry))
                assert (await ask(proxy.port, post("/v1/chat/completions", chat()))).status == 200
                endpoint["conditions"] = {"ready": False}
                await wait_until(lambda: not urls(proxy))
                await engine.stop()

    run(body())


def test_the_command_starts_with_no_engine_but_a_file_and_gets_ready(tmp_path: Path) -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        path = tmp_path / "engines"
        path.touch()
        async with started("--engines-file", str(path), "--discovery-interval", "0.1") as (process, port, _):
            assert (await ask(port, get("/health"))).status == 503
            path.write_text(engine.url)
            await ready(port)
            process.terminate()
            assert await ended(process) == 0
        await engine.stop()

    run(body())


def test_a_service_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="NAMESPACE/SERVICE:PORT"):
        KubernetesSource("vllm:8000", "")
    code, stderr = call("--engine-k8s-service", "vllm")
    assert (code, stderr.count("\n")) == (2, 1), stderr
