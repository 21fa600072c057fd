"""What the proxy counts, in a registry of its own. Every counter that can hide a failure carries a reason."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters, gauges and histograms of one proxy."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        self.requests = counter(
            "dynamo_frontend_requests", "Requests answered, by how they ended", "endpoint", "status", "reason"
        )
        self.ttft = Histogram(
            "dynamo_frontend_time_to_first_token_seconds",
            "From a complete request to the first body byte of its answer",
            registry=registry,
            buckets=_SECONDS,
        )
        self.duration = Histogram(
            "dynamo_frontend_request_duration_seconds",
            "From a complete request to the end of its answer",
            registry=registry,
            buckets=_SECONDS,
        )
        self.hit_ratio = Gauge(
            "dynamo_router_kv_cache_hit_ratio",
            "Prompt tokens predicted to be cached on the chosen engine, over all prompt tokens",
            registry=registry,
        )
        self.arrivals = counter("dynamo_router_arrivals", "Requests that wanted an engine")
        self.prompt_tokens = counter(
            "dynamo_router_prompt_tokens", "Prompt tokens routed (estimated for texts)"
        )
        self.matched_tokens = counter(
            "dynamo_router_matched_tokens", "Prompt tokens predicted cached where routed"
        )
        self.prompt_bytes = counter("dynamo_router_prompt_bytes", "Request body bytes routed")
        self.decisions = counter("dynamo_router_decisions", "Placements, by what decided", "mode", "reason")
        self.retries = counter(
            "dynamo_router_retries", "Requests sent again before their first byte", "reason"
        )
        self.events = counter("dynamo_router_kv_events", "KV events by what became of them", "reason")
        self.event_gaps = counter("dynamo_router_kv_event_gaps", "Breaks in an event stream", "reason")
        self.tokenizations = counter("dynamo_router_tokenizations", "Background tokenisations", "reason")
        self.probes = counter("dynamo_router_probe_failures", "Failed health probes", "engine", "reason")
        self.in_flight = Gauge("dynamo_router_in_flight_requests", "In flight", ["engine"], registry=registry)
        self.pending = Gauge(
            "dynamo_router_pending_prefill_tokens", "Waiting for prefill", ["engine"], registry=registry
        )
        self.ready = Gauge(
            "dynamo_router_engine_ready", "1 if the engine is ready", ["engine"], registry=registry
        )
        self.blocks = Gauge(
            "dynamo_router_kv_index_blocks", "Blocks known by events", ["engine"], registry=registry
        )
        self.arrivals_total = 0
        self.prompt_tokens_total = 0
        self.matched_tokens_total = 0

    def arrived(self, body_bytes: int) -> None:
        """A request that wants an engine is complete."""
        self.arrivals_total += 1
        self.arrivals.inc()
        self.prompt_bytes.inc(body_bytes)

    def routed(self, prompt_tokens: int, matched_tokens: int) -> None:
        """A request was placed for the first time (retries do not count its tokens again)."""
        self.prompt_tokens_total += prompt_tokens
        self.prompt_tokens.inc(prompt_tokens)
        matched = min(matched_tokens, prompt_tokens)
        self.matched_tokens_total += matched
        self.matched_tokens.inc(matched)

    def finished(self, endpoint: str, status: int, reason: str, seconds: float) -> None:
        self.requests.labels(endpoint, str(status), reason).inc()
        self.duration.observe(seconds)

    def forget_engine(self, engine: str) -> None:
        """Drop the series of an engine that left."""
        for gauge in (self.in_flight, self.pending, self.ready, self.blocks):
            with contextlib.suppress(KeyError):
                gauge.remove(engine)

    def render(self, engines: Iterable[tuple[str, int, int, bool, int]]) -> bytes:
        """Prometheus text; `engines` gives (name, in flight, pending tokens, ready, indexed blocks)."""
        for name, in_flight, pending, ready, blocks in engines:
            self.in_flight.labels(name).set(in_flight)
            self.pending.labels(name).set(pending)
            self.ready.labels(name).set(ready)
            self.blocks.labels(name).set(blocks)
        if self.prompt_tokens_total:
            self.hit_ratio.set(self.matched_tokens_total / self.prompt_tokens_total)
        return generate_latest(self.registry)

    def check(self) -> None:
        assert 0 <= self.matched_tokens_total <= self.prompt_tokens_total, "more tokens matched than routed"
