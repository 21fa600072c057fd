"""Reads one engine's `/metrics` text into plain totals; the only file that knows the engines' metric
names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .errors import ObservationError

_ABSURD = 1e15  # no token counter gets there; larger numbers are noise and would overflow sums

# Several names for one thing are tried in order: engines renamed some between releases.
_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm": {
        "running": ("vllm:num_requests_running",),
        "waiting": ("vllm:num_requests_waiting",),
        "kv_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        "prompt_tokens_total": ("vllm:prompt_tokens_total",),
        "generation_tokens_total": ("vllm:generation_tokens_total",),
        "ttft": ("vllm:time_to_first_token_seconds",),
        "itl": (
            "vllm:inter_token_latency_seconds",
            "vllm:request_time_per_output_token_seconds",
            "vllm:time_per_output_token_seconds",
        ),
        "queue_wait": ("vllm:request_queue_time_seconds",),
    },
    "sglang": {
        "running": ("sglang:num_running_reqs",),
        "waiting": ("sglang:num_queue_reqs",),
        "kv_usage": ("sglang:token_usage",),
        "prompt_tokens_total": ("sglang:prompt_tokens_total",),
        "generation_tokens_total": ("sglang:generation_tokens_total",),
        "ttft": ("sglang:time_to_first_token_seconds",),
        "itl": (
            "sglang:inter_token_latency_seconds",
            "sglang:request_time_per_output_token_seconds",
            "sglang:time_per_output_token_seconds",
        ),
        "queue_wait": ("sglang:queue_time_seconds",),
    },
}


_LINE = re.compile(r"([a-zA-Z_:][\w:]*)(\{.*\})?[ \t]+(\S+)(?:[ \t]+-?\d+)?[ \t]*\r?$")
_EDGE = re.compile(r'[{,]le="([^"]*)"')
_PREFIXES = ("vllm:", "sglan", "proce", "dynam")  # the first five letters of everything that is read
_STARTED = "process_start_time_seconds"
_LEASES = "dynamo_nixl_open_leases"
_HISTOGRAMS = ("ttft", "itl", "queue_wait")
_WANTED = frozenset(
    (
        _STARTED,
        _LEASES,
        *(name for names in _NAMES.values() for what in names.values() for name in what),
        *(
            name + end
            for names in _NAMES.values()
            for what in _HISTOGRAMS
            for name in names[what]
            for end in ("_sum", "_count", "_bucket")
        ),
    )
)


@dataclass(frozen=True)
class Histogram:
    """A histogram's running totals: seconds and samples since the engine started, and the cumulative buckets as
    (upper edge in seconds, samples), edges rising, without +Inf.
    """

    sum_seconds: float
    count: float
    buckets: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class EngineReading:
    """One scrape. Gauges and counters are summed over data-parallel ranks, `kv_usage` is their mean."""

    dialect: str
    running: float
    waiting: float
    kv_usage: float | None
    prompt_tokens_total: float | None
    generation_tokens_total: float | None
    ttft: Histogram | None
    itl: Histogram | None
    queue_wait: Histogram | None
    started_seconds: float | None
    open_leases: float = 0.0
    """Hand-offs whose KV a peer may still read; only engines with our connector say so."""


def parse_engine_metrics(text: str) -> EngineReading:
    """Translate exposition text. Raises `ObservationError` for text that is not an engine's metrics."""
    values = _collect(text)
    dialect = next((name for name in _NAMES if any(key.startswith(f"{name}:") for key in values)), None)
    if dialect is None:
        raise ObservationError("not_an_engine", "no vllm: or sglang: metric in the answer; is this an engine's URL?")
    names = _NAMES[dialect]

    def total(what: str) -> float | None:
        return _first(values, names[what], sum)

    running, waiting = total("running"), total("waiting")
    if running is None or waiting is None:
        raise ObservationError("missing_metrics", f"{names['running'][0]} or {names['waiting'][0]} is missing or NaN")
    kv_usage = _first(values, names["kv_usage"], lambda found: sum(found) / len(found))
    return EngineReading(
        dialect=dialect,
        running=running,
        waiting=waiting,
        kv_usage=None if kv_usage is None else min(1.0, kv_usage),
        prompt_tokens_total=total("prompt_tokens_total"),
        generation_tokens_total=total("generation_tokens_total"),
        ttft=_histogram(values, names["ttft"]),
        itl=_histogram(values, names["itl"]),
        queue_wait=_histogram(values, names["queue_wait"]),
        started_seconds=_first(values, (_STARTED,), max),
        open_leases=_first(values, (_LEASES,), sum) or 0.0,
    )


def _collect(text: str) -> dict[str, list[float]]:
    """Name -> one number per rank, of the names that are wanted; buckets as `name_bucket le`. Only these lines are
    read: an engine publishes hundreds, and there may be hundreds of engines.
    """
    values: dict[str, list[float]] = {}
    try:
        for line in text.split("\n"):
            if line[:5] in _PREFIXES:
                _collect_line(line, values)
    except ValueError as error:
        raise ObservationError("unreadable", f"the answer is not Prometheus text: {str(error)[:120]}") from error
    if not values:
        _insist_on_exposition(text)
    return values


def _collect_line(line: str, values: dict[str, list[float]]) -> None:
    if line.partition("{")[0].partition(" ")[0] not in _WANTED:
        return
    found = _LINE.match(line)
    if found is None:
        raise ValueError(f"{line[:80]!r} is no sample")
    name, labels, number = found.groups()
    if name.endswith("_bucket"):
        edge = _EDGE.search(labels or "")
        if edge is None or edge[1] == "+Inf":
            return
        name = f"{name} {edge[1]}"
    values.setdefault(name, []).append(float(number))


def _insist_on_exposition(text: str) -> None:
    """Tell apart what is no metrics page at all from that of another program."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        for _ in text_string_to_metric_families(text):
            pass
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ObservationError("unreadable", f"the answer is not Prometheus text: {str(error)[:120]}") from error


def _first(
    values: dict[str, list[float]], names: tuple[str, ...], fold: Callable[[list[float]], float]
) -> float | None:
    for name in names:
        found = [value for value in values.get(name, ()) if math.isfinite(value) and 0 <= value <= _ABSURD]
        # One rank without a number makes the total of all ranks unknown, not smaller.
        if found and len(found) == len(values[name]):
            return float(fold(found))
    return None


def _histogram(values: dict[str, list[float]], names: Iterable[str]) -> Histogram | None:
    for name in names:
        seconds = _first(values, (f"{name}_sum",), sum)
        count = _first(values, (f"{name}_count",), sum)
        if seconds is not None and count is not None:
            return Histogram(seconds, count, _buckets(values, f"{name}_bucket "))
    return None


def _buckets(values: dict[str, list[float]], prefix: str) -> tuple[tuple[float, float], ...]:
    found = []
    for name, counts in values.items():
        if name.startswith(prefix) and all(0 <= count <= _ABSURD for count in counts):
            edge = float(name[len(prefix) :])
            if math.isfinite(edge):
                found.append((edge, sum(counts)))
    return tuple(sorted(found))
