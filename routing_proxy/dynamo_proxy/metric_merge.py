"""Several workers' Prometheus pages as one. Pure: text in, text out."""

from __future__ import annotations

from collections.abc import Iterable

_HIT_RATIO = "dynamo_router_kv_cache_hit_ratio"
_MATCHED, _PROMPT = "dynamo_router_matched_tokens_total", "dynamo_router_prompt_tokens_total"
# Gauges of which each worker has its share; of other gauges every worker tells the same thing.
_SHARED_OUT = ("dynamo_router_in_flight_requests", "dynamo_router_pending_prefill_tokens")


def merge_pages(pages: Iterable[str]) -> str:
    """Counters and histograms are summed, gauges summed or the largest taken, the hit ratio made anew."""
    notes: dict[str, None] = {}
    kinds: dict[str, str] = {}
    series: dict[str, dict[str, float]] = {}  # family -> series -> value
    for page in pages:
        family = ""
        for line in page.splitlines():
            if line.startswith("#"):
                notes.setdefault(line)
                _, what, family, *rest = line.split(" ", 3)
                if what == "TYPE":
                    kinds[family] = rest[0]
            elif line:
                key, _, text = line.rpartition(" ")
                values = series.setdefault(family, {})
                value = float(text)
                values[key] = value if key not in values else _join(family, kinds.get(family, ""), values[key], value)
    _set_hit_ratio(series)
    lines = []
    for note in notes:
        lines.append(note)
        if note.startswith("# TYPE "):
            lines += [f"{key} {value!r}" for key, value in series.get(note.split(" ")[2], {}).items()]
    return "\n".join([*lines, ""])


def _join(family: str, kind: str, one: float, other: float) -> float:
    if family.endswith("_created"):
        return min(one, other)
    if kind == "gauge" and family not in _SHARED_OUT:
        return max(one, other)
    return one + other


def _set_hit_ratio(series: dict[str, dict[str, float]]) -> None:
    total = series.get(_PROMPT, {}).get(_PROMPT, 0.0)
    if total and _HIT_RATIO in series:
        series[_HIT_RATIO][_HIT_RATIO] = series.get(_MATCHED, {}).get(_MATCHED, 0.0) / total
