"""The proxy's configuration: parsed once, at the edge, into frozen records. A bad value stops the start."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import ConfigError
from .slo_classes import SloClass

ROUTER_MODES = ("kv", "round-robin", "random", "least-loaded")
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")
# Names in an engine's specification -> fields of EngineOptions and Timeouts.
_DEADLINES = {"connect": "connect_seconds", "first-byte": "first_byte_seconds", "idle": "idle_seconds"}
# What an engine does of a request: prefill engines compute prompts for decode engines; both: either; empty: it computes
# and decodes what it gets, and hands nothing over.
ROLES = ("prefill", "decode", "both")
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What is different about one engine; None: as for all."""

    connect_seconds: float | None = None
    first_byte_seconds: float | None = None
    idle_seconds: float | None = None
    role: str = ""  # one of ROLES, or empty
    draining: bool = False
    discovered: bool = False  # a source of engines named it, and may take it away

    def holds(self, asked: EngineOptions) -> bool:
        """True if every setting that `asked` names is as it says."""
        return all(getattr(asked, name) in (None, "", getattr(self, name)) for name in ("role", *_DEADLINES.values()))

    @property
    def deadlines(self) -> dict[str, float]:
        """Those of its own, by field."""
        return {name: value for name in _DEADLINES.values() if (value := getattr(self, name)) is not None}

    def applied_to(self, timeouts: Timeouts) -> Timeouts:
        own = self.deadlines
        return replace(timeouts, **own) if own else timeouts


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where one engine listens. `url` is the canonical form that admin calls and metrics use."""

    host: str
    port: int
    options: EngineOptions = field(default=EngineOptions(), compare=False)
    tls: bool = False

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://{self.authority}"

    @property
    def authority(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may make the proxy hold."""

    max_head_bytes: int = 64 * 1024
    max_body_bytes: int = 32 * MIB
    high_water_bytes: int = 256 * 1024
    pipeline_bytes: int = 64 * 1024


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Deadlines in seconds."""

    connect_seconds: float = 5.0
    first_byte_seconds: float = 300.0
    idle_seconds: float = 300.0
    client_idle_seconds: float = 75.0
    upstream_keep_alive_seconds: float = 4.0
    drain_seconds: float = 30.0
    probe_interval_seconds: float = 2.0
    probe_timeout_seconds: float = 5.0
    start_grace_seconds: float = 120.0  # how long an engine that never answered counts as starting
    replay_seconds: float = 3.0

    @property
    def soonest_seconds(self) -> float:
        """No deadline of an answer is over before."""
        return min(self.first_byte_seconds, self.idle_seconds)


@dataclass(frozen=True, slots=True)
class Routing:
    """How engines are chosen in kv mode, beyond the mode itself. `overlap_weight` None means our rule, not Dynamo's."""

    overlap_weight: float | None = None
    temperature: float = 0.0
    host_hit_weight: float = 0.75
    disk_hit_weight: float = 0.25
    object_hit_weight: float = 0.25
    peer_hit_weight: float = 0.25  # until it is learnt; 0: nothing, for ever
    session_seconds: float = 0.0  # how long a session stays with its engine; 0: it does not
    warm_up_seconds: float = 10.0  # how long an engine that is new among others gets less; 0: not at all
    engine_request_limit: int = 0  # requests an engine may have; 0: as many as come
    queue_size: int = 1024  # requests that may wait for one with room
    queue_seconds: float = 30.0
    slo_classes: tuple[SloClass, ...] = ()
    # A decode engine computes as many itself: prices do not know what a hand-off costs. On two H200s (2026-11-28)
    # 4,104 tokens apart cut the longest gap of other streams from 78 to 34 ms; 1,032 by 8 ms, for 57 ms of their TTFT.
    prefill_min_tokens: int = 4096
    prefill_max_queued_tokens: int = -1  # of a prefill engine that is asked; -1: as long as it is sooner
    prefill_seconds: float = 60.0  # how long a prefill engine may take


@dataclass(frozen=True, slots=True)
class DiscoverySources:
    """Where engines are named besides the command line."""

    files: tuple[str, ...] = ()
    dns: tuple[str, ...] = ()
    services: tuple[str, ...] = ()
    kubernetes_api: str = ""  # empty: as a pod finds it
    interval_seconds: float = 2.0

    def __bool__(self) -> bool:
        return bool(self.files or self.dns or self.services)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files; no certificate: clients speak plain HTTP; no authorities: the system's."""

    cert_file: str = ""
    key_file: str = ""
    engine_ca_file: str = ""


@dataclass(frozen=True, slots=True)
class Replicas:
    """Other proxies before the same fleet: addresses are HOST:PORT (UDP) or unix:PATH; all share the key."""

    listen: str
    peers: tuple[str, ...]
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ProxyConfig:
    """Everything `dynamo-proxy` was told. `admin_port` None means no admin listener; port 0 means any free
    one.
    """

    engines: tuple[EngineAddress, ...]
    host: str = "127.0.0.1"
    port: int = 8080
    admin_host: str = "127.0.0.1"
    admin_port: int | None = 8081
    router_mode: str = "kv"
    routing: Routing = field(default_factory=Routing)
    replicas: Replicas | None = None
    kv_block_tokens: int = 16
    use_kv_events: bool = True
    resume_streams: bool = True
    api_keys_path: str = ""  # empty: everybody may call
    aliases: tuple[tuple[str, str], ...] = ()  # names that clients may use, and the models that they mean
    tls: TlsFiles = field(default_factory=TlsFiles)
    discovery: DiscoverySources = field(default_factory=DiscoverySources)
    engine_api_key: str = field(default="", repr=False)
    access_log: str = ""  # a file, or - for standard output; empty: none
    traces_endpoint: str = ""  # of an OTLP collector; empty: no spans
    control_routes: bool = False  # pass what operates an engine to it
    workers: int = 1
    admin_socket: str = ""  # of a worker: where its supervisor asks
    supervisor_socket: str = ""  # of a worker: where the numbers of all workers are to be had
    limits: Limits = field(default_factory=Limits)
    timeouts: Timeouts = field(default_factory=Timeouts)


def parse_engine_url(text: str) -> EngineAddress:
    """Return the address in an engine URL such as http://10.0.0.5:8000; raise ConfigError with the remedy."""
    example = "give it as http://HOST:PORT or https://HOST:PORT, for example http://127.0.0.1:8000"
    text, *settings = text.strip().split(",")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"engine URL {text!r} is not valid ({error}); {example}") from None
    tls = parts.scheme == "https"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"engine URL {text!r} is not valid; {example}")
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(f"engine URL {text!r} has more than a host and a port; {example}")
    if port == 0 or not _is_host(parts.hostname):
        raise ConfigError(f"engine URL {text!r} has no usable host and port; {example}")
    return EngineAddress(parts.hostname, port or (443 if tls else 80), parse_options(text, settings), tls)


def parse_options(url: str, settings: list[str]) -> EngineOptions:
    """NAME=VALUE pairs behind an engine URL."""
    values: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name == "role" and value in ROLES:
            values["role"] = value
            continue
        if name not in _DEADLINES:
            names = ", ".join(f"{known}=SECONDS" for known in _DEADLINES)
            raise ConfigError(
                f"engine {url}: {setting!r} is no setting; behind the URL may stand {names}, role=prefill|decode|both"
            )
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0.01 <= seconds <= 86_400:
            raise ConfigError(f"engine {url}: {value!r} is out of range for {name}; give seconds from 0.01 to 86400")
        values[_DEADLINES[name]] = seconds
    return replace(EngineOptions(), **values)


def _is_host(host: str) -> bool:
    if ":" in host:
        try:
            return bool(ipaddress.ip_address(host))
        except ValueError:
            return False
    return _HOST_NAME.fullmatch(host) is not None


def parse_engine_urls(texts: list[str], may_be_none: bool = False) -> tuple[EngineAddress, ...]:
    """Parse all engine URLs; at least one, unless more may be found or added, and none twice."""
    if not texts and not may_be_none:
        raise ConfigError(
            "no engine given, and none can be added with --admin-port 0; name one, "
            "for example --engine http://127.0.0.1:8000"
        )
    engines = tuple(parse_engine_url(text) for text in texts)
    for address in engines:
        if engines.count(address) > 1:
            raise ConfigError(f"engine {address.url} is given twice; name each engine once")
    return engines


def parse_aliases(texts: list[str]) -> tuple[tuple[str, str], ...]:
    """NAME=MODEL pairs. Raises ConfigError."""
    aliases: list[tuple[str, str]] = []
    for text in texts:
        name, _, model = text.partition("=")
        if not name or not model or name == model:
            raise ConfigError(f"--model-alias {text!r} is not NAME=MODEL; for example fast=llama-8b")
        if any(name == other for other, _ in aliases):
            raise ConfigError(f"--model-alias {name} is given twice; an alias means one model")
        aliases.append((name, model))
    return tuple(aliases)


def parse_replicas(listen: str, peers: list[str], key_path: str) -> Replicas | None:
    """The settings of replica sync, None if it is off; raise ConfigError with the remedy."""
    if not listen:
        if peers or key_path:
            raise ConfigError("--replica-sync-peer and -key-file need --replica-sync-listen HOST:PORT")
        return None
    for address in (listen, *peers):
        host, _, port = address.rpartition(":")
        try:
            plain = bool(ipaddress.ip_address(host.strip("[]")))
        except ValueError:
            plain = False
        if not address.startswith("unix:/") and not (plain and port.isdigit() and 0 < int(port) < 65536):
            raise ConfigError(f"replica address {address!r} is not valid; give IP:PORT, for example 10.0.0.7:8082")
    if listen in peers:
        raise ConfigError(f"--replica-sync-peer {listen} is this proxy's own --replica-sync-listen; name the others")
    if not key_path:
        raise ConfigError("--replica-sync-listen needs --replica-sync-key-file, a file with the key that all share")
    try:
        key = Path(key_path).read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"--replica-sync-key-file {key_path}: {error.strerror}; name a readable file") from None
    if len(key) < 16:
        raise ConfigError(
            f"--replica-sync-key-file {key_path} holds {len(key)} bytes and must hold at least 16, for example what "
            "`openssl rand -hex 32` says"
        )
    return Replicas(listen, tuple(peers), key)


def of_workers(replicas: Replicas, count: int) -> list[Replicas]:
    """What the workers of one proxy tell each other and other proxies: worker n has the n-th port from the one given,
    here and at the peers, which have as many workers. Raises ConfigError.
    """

    def places(address: str) -> list[str]:
        host, _, port = address.rpartition(":")
        if not port.isdigit() or int(port) + count > 65536:
            raise ConfigError(f"replica address {address} needs {count} ports from its own on; give a lower IP:PORT")
        return [f"{host}:{int(port) + number}" for number in range(count)]

    own = places(replicas.listen)
    others = [place for peer in replicas.peers for place in places(peer)]
    for place in set(own).intersection(others):
        raise ConfigError(f"replica address {place} is a peer's and that of a worker here; move it by {count} ports")
    return [Replicas(place, (*(near for near in own if near != place), *others), replicas.key) for place in own]


def parse_router_mode(text: str) -> str:
    if text not in ROUTER_MODES:
        raise ConfigError(f"router mode {text!r} is unknown; choose one of {', '.join(ROUTER_MODES)}")
    return text


def require_range(flag: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless low <= value <= high."""
    if not low <= value <= high:
        raise ConfigError(f"{flag} {value:.12g} is out of range; give a value from {low:.12g} to {high:.12g}")
