"""What the proxy counts, in a registry of its own. Every counter that can hide a failure carries a reason.

What every request touches is counted in plain numbers (tallies.py) and dressed for Prometheus when it is asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from .slo_classes import SloClass
from .tallies import SECONDS, Durations, Tallies

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MILLISECONDS = tuple(seconds * 1000 for seconds in SECONDS)


class Metrics(Collector):
    """The counters, gauges and histograms of one proxy."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        self.tallies = Tallies()
        self._prefill: dict[str, Durations] = {}  # by engine, in milliseconds
        self.hit_ratio = Gauge(
            "dynamo_router_kv_cache_hit_ratio",
            "Prompt tokens predicted to be cached on the chosen engine, over all prompt tokens",
            registry=registry,
        )
        self.retries = counter("dynamo_router_retries", "Requests sent again before their first byte", "reason")
        self.internal_errors = counter("dynamo_router_internal_errors", "Requests that a mistake of the proxy ended")
        self.resumes = counter("dynamo_router_stream_resumes", "Broken streams by what became of them", "reason")
        self.prefill_legs = counter(
            "dynamo_router_prefill_legs", "Prompts for decode engines by who computed", "reason"
        )
        self.hints = counter("dynamo_router_hints", "Hints sent to engines that run our connector", "kind")
        self.slo = counter(
            "dynamo_router_slo_streams", "Streams by when their first token came, if it did", "slo_class", "outcome"
        )
        self.trips = counter("dynamo_router_breaker_trips", "Engines left alone for a while", "engine", "reason")
        self.events = counter("dynamo_router_kv_events", "KV events by what became of them", "reason")
        self.event_gaps = counter("dynamo_router_kv_event_gaps", "Breaks in an event stream", "reason")
        self.tokenizations = counter("dynamo_router_tokenizations", "Background tokenisations", "reason")
        self.replica_news = counter("dynamo_router_replica_news", "Datagrams between replicas", "reason")
        self.probes = counter("dynamo_router_probe_failures", "Failed health probes", "engine", "reason")
        self.in_flight = Gauge("dynamo_router_in_flight_requests", "In flight", ["engine"], registry=registry)
        self.pending = Gauge(
            "dynamo_router_pending_prefill_tokens", "Waiting for prefill", ["engine"], registry=registry
        )
        self.ready = Gauge("dynamo_router_engine_ready", "1 if the engine is ready", ["engine"], registry=registry)
        self.blocks = Gauge("dynamo_router_kv_index_blocks", "Blocks known by events", ["engine"], registry=registry)
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The plain numbers, for the registry."""
        tallies = self.tallies
        labels = ("endpoint", "status", "reason")
        requests = CounterMetricFamily(
            "dynamo_frontend_requests", "Requests answered, by how they ended", labels=labels
        )
        for (endpoint, status, reason), count in tallies.requests.items():
            requests.add_metric((endpoint, str(status), reason), count)
        decisions = CounterMetricFamily(
            "dynamo_router_decisions", "Placements, by what decided", labels=("mode", "reason")
        )
        for chosen, count in tallies.decisions.items():
            decisions.add_metric(chosen, count)
        yield from (requests, decisions)
        for name, text, total in (
            ("arrivals", "Requests that wanted an engine", tallies.arrivals),
            ("prompt_tokens", "Prompt tokens routed (estimated for texts)", tallies.prompt_tokens),
            ("matched_tokens", "Prompt tokens predicted cached where routed", tallies.matched_tokens),
            ("prompt_bytes", "Request body bytes routed", tallies.prompt_bytes),
        ):
            yield CounterMetricFamily(f"dynamo_router_{name}", text, total)
        name = "dynamo_frontend_time_to_first_token_seconds"
        text = "From a complete request to the first body byte of its answer"
        yield HistogramMetricFamily(name, text, *tallies.ttft.buckets())
        name = "dynamo_worker_prefill_latency_ms"
        prefill = HistogramMetricFamily(name, "From a request sent to its first token", labels=("engine",))
        for engine, times in self._prefill.items():
            prefill.add_metric((engine,), *times.buckets())
        yield prefill
        name = "dynamo_frontend_request_duration_seconds"
        text = "From a complete request to the end of its answer"
        yield HistogramMetricFamily(name, text, *tallies.duration.buckets())

    def first_token(self, seconds: float, slo: SloClass) -> None:
        """The first token of a stream came, so long after its request, and when it was wanted."""
        self.slo.labels(slo.name, "in_time" if seconds <= slo.ttft_seconds else "late").inc()

    def prefilled(self, engine: str, seconds: float) -> None:
        """The first token of a stream came, so long after its request was sent."""
        times = self._prefill.get(engine)
        if times is None:
            times = self._prefill[engine] = Durations(_MILLISECONDS)
        times.observe(seconds * 1e3)

    def forget_engine(self, engine: str) -> None:
        """Drop the series of an engine that left."""
        self._prefill.pop(engine, None)
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
        if self.tallies.prompt_tokens:
            self.hit_ratio.set(self.tallies.matched_tokens / self.tallies.prompt_tokens)
        return generate_latest(self.registry)

    def check(self) -> None:
        self.tallies.check()
