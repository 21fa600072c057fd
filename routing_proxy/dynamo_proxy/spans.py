"""One OpenTelemetry span per request, made from its record when it is over and sent by the SDK's own thread.

Its parent is the span that the request's `traceparent` names. The header passes to the engine as it came, so the
engine's spans stand beside this one. The SDK's own OTEL_* variables (sampling, service name, headers) count.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .access_log import Record
from .errors import ConfigError

_TRACE_HEADER = re.compile(rb"^(traceparent|tracestate):[ \t]*([^\r\n]{1,512})", re.IGNORECASE | re.MULTILINE)
_CLOSE_SECONDS = 5.0
_UNNAMED = "unknown_service"  # as the SDK calls a service that nobody named
_MISSING = "--otlp-traces-endpoint needs OpenTelemetry; pip install 'dynamo-connectors[otel]'"
log = logging.getLogger("dynamo_proxy")


class SpanSink:
    """Spans go to a collector by OTLP over HTTP, `endpoint` with its path, mostly /v1/traces."""

    def __init__(self, endpoint: str) -> None:
        """Raises ConfigError."""
        if not endpoint.startswith(("http://", "https://")):
            example = "give a URL, for example http://collector:4318/v1/traces"
            raise ConfigError(f"--otlp-traces-endpoint {endpoint!r} is not valid; {example}")
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise ConfigError(_MISSING) from None
        resource = Resource.create()
        if str(resource.attributes.get("service.name", _UNNAMED)).startswith(_UNNAMED):
            resource = resource.merge(Resource({"service.name": "dynamo-proxy"}))
        self._provider: Any = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer: Any = self._provider.get_tracer("dynamo_proxy")
        self._parents: Any = TraceContextTextMapPropagator()
        self._trace: Any = trace

    def write(self, records: Sequence[Record], dropped: int) -> int:
        """What the SDK's own bounded queue cannot take it drops by itself."""
        for record in records:
            self._write(record)
        return 0

    async def close(self) -> None:
        """Sends what waits, for a few seconds: a thread that nobody joins, so a dead collector holds up no exit."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            try:
                self._provider.shutdown()
            finally:
                with contextlib.suppress(RuntimeError):  # the loop is gone: it came too late
                    loop.call_soon_threadsafe(done.set)

        threading.Thread(target=shut_down, name="spans-close", daemon=True).start()
        try:
            await asyncio.wait_for(done.wait(), _CLOSE_SECONDS)
        except asyncio.TimeoutError:
            log.warning("the collector of spans did not take the last ones in %gs: they are lost", _CLOSE_SECONDS)

    def _write(self, record: Record) -> None:
        trace, ended, end = self._trace, record.ended, int(record.at * 1e9)
        attributes: dict[str, Any] = {
            "http.route": record.endpoint,
            "http.response.status_code": ended.status,
            "gen_ai.request.model": record.model,
            "dynamo.end": ended.reason,
        }
        if record.receipt is not None:
            attributes |= {f"dynamo.{name}": value for name, value in asdict(record.receipt).items()}
        named = _TRACE_HEADER.findall(record.headers)
        carrier = {name.decode().lower(): value.decode("latin-1") for name, value in named}
        span = self._tracer.start_span(
            f"route {record.endpoint}",
            self._parents.extract(carrier),
            trace.SpanKind.SERVER,
            attributes,
            start_time=end - int(ended.seconds * 1e9),
        )
        if ended.status >= 500 or (ended.status < 400 and ended.reason not in ("ok", "engine_answer")):
            span.set_status(trace.StatusCode.ERROR, ended.reason)
        span.end(end)
