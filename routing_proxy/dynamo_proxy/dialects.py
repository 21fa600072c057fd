"""What vLLM and SGLang say about themselves, and where: health, models, KV event sources, KV capacity.

Pure translation: JSON or metrics text in, frozen records out. Version differences live here and nowhere else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .hints import PEER

VLLM_SOURCES_PATH = "/kv_event_sources"  # 0.32 and newer
SGLANG_INFO_PATH = "/server_info"
# Streams that can go on elsewhere: they carry token ids, or tell enough to find them.
ON_TAPE = {
    "vllm": ("/v1/chat/completions", "/v1/completions"),
    "sglang": ("/v1/chat/completions", "/v1/completions", "/generate"),
}
_CACHE_CONFIG = re.compile(r"^vllm:cache_config_info\{(.*)\} ", re.MULTILINE)
_CONNECTOR = re.compile(r"^# TYPE dynamo_kvbm_", re.MULTILINE)
_PEER_NAME = re.compile(r"[!-~]{1,300}")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class EventSource:
    """One publisher of KV events: where to subscribe, where to ask for missed batches (empty: nowhere)."""

    rank: int
    endpoint: str
    replay_endpoint: str
    topic: str


@dataclass(frozen=True, slots=True)
class ServedModels:
    """Model ids an engine serves, those of them that are LoRA adapters, their listing entries, and what kind of
    engine it says it is (empty: it does not say).
    """

    ids: frozenset[str]
    loras: frozenset[str]
    entries: tuple[dict[str, Any], ...]
    kind: str = ""

    @property
    def max_model_tokens(self) -> int:
        """The longest context in tokens, 0 if the engine does not say."""
        lengths = [entry.get("max_model_len") for entry in self.entries]
        return max((length for length in lengths if type(length) is int), default=0)


def read_models(listing: Any) -> ServedModels | None:
    """The answer of /v1/models, or None if it has another shape."""
    data = listing.get("data") if isinstance(listing, dict) else None
    if not isinstance(data, list):
        return None
    entries = tuple(entry for entry in data if isinstance(entry, dict) and isinstance(entry.get("id"), str))
    loras = frozenset(entry["id"] for entry in entries if entry.get("parent"))
    owners = {str(entry.get("owned_by")) for entry in entries}
    kind = owners.pop() if len(owners) == 1 else ""
    return ServedModels(frozenset(entry["id"] for entry in entries), loras, entries, kind)


def vllm_sources(answer: Any, host: str) -> tuple[EventSource, ...]:
    """The answer of vLLM's /kv_event_sources: publisher settings by data-parallel rank."""
    sources = []
    for rank, settings in answer.items() if isinstance(answer, dict) else ():
        if not isinstance(settings, dict) or not str(rank).isdigit():
            continue
        if not settings.get("enable_kv_cache_events") or settings.get("publisher") != "zmq":
            continue
        endpoint = reachable_endpoint(settings.get("endpoint"), host)
        if endpoint:
            replay = reachable_endpoint(settings.get("replay_endpoint"), host)
            sources.append(EventSource(int(rank), endpoint, replay, str(settings.get("topic") or "")))
    return tuple(sources)


def sglang_sources(answer: Any, host: str) -> tuple[EventSource, ...]:
    """The `kv_events` part of SGLang's /server_info: port bases, one port per data-parallel rank."""
    events = answer.get("kv_events") if isinstance(answer, dict) else None
    if not isinstance(events, dict) or events.get("publisher", "zmq") != "zmq":
        return ()
    port, replay_port = events.get("endpoint_port_base"), events.get("replay_endpoint_port_base")
    if type(port) is not int:
        return ()
    own_host = _usable_host(events.get("endpoint_host"), host)
    replay_host = _usable_host(events.get("replay_endpoint_host"), host)
    ranks = events.get("dp_size") if type(events.get("dp_size")) is int else 1
    return tuple(
        EventSource(
            rank,
            f"tcp://{own_host}:{port + rank}",
            f"tcp://{replay_host}:{replay_port + rank}" if type(replay_port) is int else "",
            str(events.get("topic") or ""),
        )
        for rank in range(min(max(1, ranks or 1), 256))
    )


def reachable_endpoint(endpoint: Any, host: str) -> str:
    """A publisher's bind address as a subscriber must write it: a wildcard becomes the engine's host."""
    if not isinstance(endpoint, str) or not endpoint:
        return ""
    if not endpoint.startswith("tcp://"):
        return endpoint
    address, _, port = endpoint[6:].rpartition(":")
    return f"tcp://{_usable_host(address, host)}:{port}" if port.isdigit() else ""


def vllm_capacity_tokens(metrics_text: str) -> int | None:
    """KV capacity from vLLM's cache_config_info, over all data-parallel ranks."""
    total = 0
    for match in _CACHE_CONFIG.finditer(metrics_text):
        labels = dict(_LABEL.findall(match[1]))
        blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
        if blocks.isdigit() and size.isdigit():
            total += int(blocks) * int(size)
    return total or None


def runs_connector(metrics_text: str) -> bool:
    """True if the metrics of a vLLM are those of one with our connector."""
    return _CONNECTOR.search(metrics_text) is not None


def peer_name(answer: Any) -> str:
    """What an engine that was asked for its name answers; empty if it has none."""
    params = answer.get("kv_transfer_params") if isinstance(answer, dict) else None
    name = params.get(PEER) if isinstance(params, dict) else None
    return name if isinstance(name, str) and _PEER_NAME.fullmatch(name) else ""


def sglang_bootstrap_port(answer: Any) -> int:
    """Where a prefill engine's decode engines meet it, from SGLang's /server_info; 0: it is no prefill engine."""
    port = answer.get("disaggregation_bootstrap_port") if isinstance(answer, dict) else None
    is_prefill = isinstance(answer, dict) and answer.get("disaggregation_mode") == "prefill"
    return port if is_prefill and type(port) is int and 0 < port < 65_536 else 0


def sglang_capacity_tokens(answer: Any) -> int | None:
    """KV capacity from SGLang's /server_info."""
    value = answer.get("max_total_num_tokens") if isinstance(answer, dict) else None
    if value is None and isinstance(answer, dict):
        states = answer.get("internal_states")
        first = states[0] if isinstance(states, list) and states and isinstance(states[0], dict) else {}
        value = first.get("max_total_num_tokens")
    return value if type(value) is int and value > 0 else None


def _usable_host(announced: Any, host: str) -> str:
    wildcards = ("", "*", "0.0.0.0", "::", "[::]")
    chosen = host if not isinstance(announced, str) or announced in wildcards else announced
    return f"[{chosen}]" if ":" in chosen and not chosen.startswith("[") else chosen
