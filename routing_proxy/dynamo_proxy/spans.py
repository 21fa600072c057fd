"""One OpenTelemetry span per request, made from its record when it is over and sent by the SDK's own thread.

Its parent is the span that the request's `traceparent` names. The header passes to the engine as it came, so the
engine's spans stand beside this one. The SDK's own OTEL_* variables (sampling, service name, headers) count.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .access_log import Record
from .errors import ConfigError

_TRACE_HEADER = re.compile(rb"^(traceparent|tracestate):[ \t]*([^\r\n]{1,512})", re.IGNORECASE | re.MULTILINE)
_UNNAMED = "unknown_service"  # as the SDK calls a service that nobody named
_MISSING = "--otlp-traces-endpoint needs OpenTelemetry; pip install 'dynamo-connectors[otel]'"


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
        """Sends what waits, as long as the exporter's own deadline."""
        await asyncio.to_thread(self._provider.shutdown)

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
