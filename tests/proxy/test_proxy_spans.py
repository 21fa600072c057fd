"""OpenTelemetry: a span per request at a real collector's port, with the route it took; nothing without the flag."""

from __future__ import annotations

import builtins
import sys
import threading
from typing import Any

import pytest
from aiohttp import web
from dynamo_proxy import spans
from dynamo_proxy.errors import ConfigError
from dynamo_proxy.spans import SpanSink
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.proxy.proxy_fakes import FakeEngine, ask, chat, post, proxy_before, run

ROUTE = "/v1/chat/completions"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Keeps the spans it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.service = ""

    async def start(self) -> Collector:
        app = web.Application()
        app.router.add_post("/v1/traces", self._take)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1/traces"
        return self

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        said = ExportTraceServiceRequest.FromString(await request.read())
        for resource in said.resource_spans:
            self.service = _plain(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return web.Response(content_type="application/x-protobuf")


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


def test_each_request_is_a_span_of_its_callers_trace() -> None:
    async def body() -> None:
        collector, engine = await Collector().start(), await FakeEngine().start()
        try:
            async with proxy_before(engine, traces_endpoint=collector.url) as proxy:
                await ask(proxy.port, post(ROUTE, chat("hello " * 100), f"traceparent: 00-{TRACE}-{PARENT}-01"))
                await ask(proxy.port, post(ROUTE, {**chat(), "model": "none"}))
                engine.status = 500
                await ask(proxy.port, post(ROUTE, chat()))
            assert dict(engine.requests[0][1])["traceparent"] == f"00-{TRACE}-{PARENT}-01"
        finally:
            await collector.stop()
        served, unknown, failed = collector.spans
        assert (served.trace_id.hex(), served.parent_span_id.hex()) == (TRACE, PARENT)
        said = _plain(served.attributes)
        assert (said["http.route"], said["http.response.status_code"], said["gen_ai.request.model"]) == (
            ROUTE,
            200,
            "tiny",
        )
        assert (said["dynamo.engine"], said["dynamo.reason"], said["dynamo.end"]) == ("engine-0", "only", "ok")
        assert said["dynamo.prompt_tokens"] > 0
        assert 0 < served.start_time_unix_nano <= served.end_time_unix_nano  # the clock counts milliseconds
        assert unknown.trace_id != served.trace_id
        assert not unknown.parent_span_id
        assert _plain(unknown.attributes)["dynamo.end"] == "model_not_found"
        assert [span.status.code for span in (served, unknown, failed)] == [0, 0, 2]
        assert collector.service == "dynamo-proxy"

    run(body())


def test_a_collector_that_is_not_there_costs_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "1")

    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine, traces_endpoint="http://127.0.0.1:9/v1/traces") as proxy:
            assert (await ask(proxy.port, post(ROUTE, chat()))).status == 200

    run(body())


def test_a_collector_that_takes_nothing_does_not_hold_up_the_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "_CLOSE_SECONDS", 0.05)
    sink, release = SpanSink("http://127.0.0.1:9/v1/traces"), threading.Event()
    shut_down = sink._provider.shutdown
    monkeypatch.setattr(sink._provider, "shutdown", lambda: (release.wait(), shut_down()))
    run(sink.close())
    (left,) = [thread for thread in threading.enumerate() if thread.name == "spans-close"]
    assert left.daemon
    release.set()
    left.join()


def test_what_cannot_be_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--otlp-traces-endpoint 'collector' is not valid"):
        SpanSink("collector")
    real = builtins.__import__

    def missing(name: str, *more: Any, **named: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *more, **named)

    for name in [name for name in sys.modules if name.startswith("opentelemetry.sdk")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"dynamo-connectors\[otel\]"):
        SpanSink("http://collector:4318/v1/traces")
