"""The `dynamo-proxy` command: flags to one frozen configuration, mistakes to one line on stderr."""

from __future__ import annotations

import inspect
import logging
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .api_keys import KeyRing
from .config import (
    MIB,
    DiscoverySources,
    Limits,
    ProxyConfig,
    Routing,
    Timeouts,
    TlsFiles,
    of_workers,
    parse_aliases,
    parse_engine_url,
    parse_engine_urls,
    parse_replicas,
    parse_router_mode,
    require_range,
)
from .discovery import FileSource, parse_service
from .errors import ConfigError, DiscoveryError, ProxyError
from .slo_classes import parse_slo_classes
from .tls import ServerTls, client_context

_DAY = 86_400.0
log = logging.getLogger("dynamo_proxy")
_OWN_TOKENS = (
    "Uncached tokens that a decode engine computes itself: handing over so few costs them more than it saves other "
    "streams (measured on two H200s)"
)
_QUEUED = "Tokens that may wait at a prefill engine that is asked; -1: while it is sooner than the decode engine"


@dataclass(frozen=True, slots=True)
class _Flag:
    """One flag of the command: its default decides its type; numbers have a range."""

    name: str
    default: Any
    text: str
    low: float = 0
    high: float = 0

    @property
    def spelling(self) -> str:
        return "--" + self.name.replace("_", "-")

    def parameter(self) -> inspect.Parameter:
        kind = list[str] | None if self.default is None else type(self.default)
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=self.default,
            annotation=Annotated[kind, typer.Option(help=self.text)],
        )


FLAGS = (
    _Flag("engine", None, "An engine, http://HOST:PORT[,role=R][,connect=S][,first-byte=S][,idle=S]; repeat for each"),
    _Flag("engines_file", None, "A file of engines, one a line as for --engine; read again when it changes"),
    _Flag("engine_dns", None, "http://NAME:PORT: every address of the name is an engine; repeat for each"),
    _Flag("engine_k8s_service", None, "NAMESPACE/SERVICE:PORT: its ready endpoints are engines; repeat for each"),
    _Flag("kubernetes_api", "", "URL of the API server; without it, as pods find it"),
    _Flag("discovery_interval", 2.0, "Seconds between looks for engines", 0.05, 3600),
    _Flag("host", "127.0.0.1", "Address to listen on"),
    _Flag("port", 8080, "Port to listen on; 0 takes a free one", 0, 65535),
    _Flag("admin_host", "127.0.0.1", "Address of the admin listener"),
    _Flag("admin_port", 8081, "Port of the admin listener; 0 turns it off", 0, 65535),
    _Flag("workers", 1, "Processes that serve the port", 1, 128),
    _Flag("router_mode", "kv", "kv, round-robin, random or least-loaded"),
    _Flag("kv_overlap_score_weight", -1.0, "Use Dynamo's cost rule with this weight; -1: ours", -1, 1000),
    _Flag("router_temperature", 0.0, "Above 0: draw engines by a softmax over costs", 0, 1000),
    _Flag("router_host_cache_hit_weight", 0.75, "Worth of a block in host memory, of one in HBM", 0, 1),
    _Flag("router_disk_cache_hit_weight", 0.25, "Worth of a block on disk", 0, 1),
    _Flag("router_object_cache_hit_weight", 0.25, "Worth of a block in an object store", 0, 1),
    _Flag(
        "router_peer_cache_hit_weight", 0.25, "Worth of a block that a peer holds, until it is learnt; 0: none", 0, 1
    ),
    _Flag("router_session_affinity_ttl_secs", 0.0, "Keep a session on its engine for so long; 0: no", 0, _DAY),
    _Flag("engine_warm_up", 10.0, "Seconds in which a new engine's share grows to a whole one; 0: at once", 0, 3600),
    _Flag("engine_request_limit", 0, "Requests an engine may have, then they wait; 0: no limit", 0, 1_000_000),
    _Flag("queue_size", 1024, "Requests that may wait; more get 429", 0, 1_000_000),
    _Flag("slo_class", None, "NAME,ttft=SECONDS[,priority=N]: a class that requests name in service_tier; repeatable"),
    _Flag("queue_timeout", 30.0, "Seconds a request may wait, then it gets 503", 0.01, 3600),
    _Flag("disagg_prefill_min_tokens", 4096, _OWN_TOKENS, 0, 10_000_000),
    _Flag("disagg_prefill_max_queued_tokens", -1, _QUEUED, -1, 1_000_000_000),
    _Flag("disagg_prefill_timeout", 60.0, "vLLM: seconds a prefill engine may take; then decode computes", 0.01, 3600),
    _Flag("replica_sync_listen", "", "IP:PORT where other proxies before this fleet tell their load (UDP)"),
    _Flag("replica_sync_peer", None, "IP:PORT of another proxy; repeat for each"),
    _Flag("replica_sync_key_file", "", "File with the key that all of them share"),
    _Flag("kv_cache_block_size", 16, "Tokens per KV block until an engine tells its own", 1, 65536),
    _Flag("kv_events", True, "Subscribe to the engines' KV events"),
    _Flag("stream_resume", True, "Go on with broken text streams on another engine"),
    _Flag("access_log", "", "File for one line of JSON per request; - is standard output"),
    _Flag("otlp_traces_endpoint", "", "URL of an OpenTelemetry collector (/v1/traces): a span per request"),
    _Flag("api_keys_file", "", "File of hashed API keys; without it everybody may call"),
    _Flag("model_alias", None, "NAME=MODEL: a name that clients may use for a model; repeat for each"),
    _Flag("tls_cert_file", "", "PEM certificate (chain) for clients; without it they speak plain HTTP"),
    _Flag("tls_key_file", "", "PEM key of the certificate, if it is not in the same file"),
    _Flag("engine_ca_file", "", "PEM authorities that engines' certificates are checked by"),
    _Flag("engine_api_key_file", "", "File with the API key that the engines want"),
    _Flag("engine_control_routes", False, "Pass on routes that operate an engine (/sleep, /server_info, ...)"),
    _Flag("max_body_bytes", 32 * MIB, "Largest request body", 1024, 4096 * MIB),
    _Flag("connect_timeout", 5.0, "Seconds to connect to an engine", 0.01, 600),
    _Flag("request_timeout", 300.0, "Seconds until the first byte of an answer", 0.01, _DAY),
    _Flag("idle_timeout", 300.0, "Seconds without a byte within an answer", 0.01, _DAY),
    _Flag("drain_timeout", 30.0, "Seconds that requests in flight get at shutdown", 0, _DAY),
    _Flag("health_interval", 2.0, "Seconds between health probes", 0.05, 3600),
    _Flag("engine_start_grace", 120.0, "Seconds after which an engine that never answered counts as down", 0, _DAY),
)


def read_config(values: dict[str, Any]) -> ProxyConfig:
    """Flag values to the frozen configuration. Raises ConfigError."""
    for flag in FLAGS:
        if flag.high:
            require_range(flag.spelling, values[flag.name], flag.low, flag.high)
    discovery = _discovery(values)
    _check_files(values)
    replicas = parse_replicas(
        values["replica_sync_listen"], values["replica_sync_peer"] or [], values["replica_sync_key_file"]
    )
    if replicas is not None and values["workers"] > 1:
        of_workers(replicas, values["workers"])  # tells of ports that do not exist
    return ProxyConfig(
        engines=parse_engine_urls(values["engine"] or [], may_be_none=bool(discovery or values["admin_port"])),
        discovery=discovery,
        host=values["host"],
        port=values["port"],
        admin_host=values["admin_host"],
        admin_port=values["admin_port"] or None,
        router_mode=parse_router_mode(values["router_mode"]),
        replicas=replicas,
        routing=Routing(
            overlap_weight=values["kv_overlap_score_weight"] if values["kv_overlap_score_weight"] >= 0 else None,
            temperature=values["router_temperature"],
            host_hit_weight=values["router_host_cache_hit_weight"],
            disk_hit_weight=values["router_disk_cache_hit_weight"],
            object_hit_weight=values["router_object_cache_hit_weight"],
            peer_hit_weight=values["router_peer_cache_hit_weight"],
            session_seconds=values["router_session_affinity_ttl_secs"],
            warm_up_seconds=values["engine_warm_up"],
            engine_request_limit=values["engine_request_limit"],
            queue_size=values["queue_size"],
            queue_seconds=values["queue_timeout"],
            slo_classes=tuple(parse_slo_classes(values["slo_class"] or []).values()),
            prefill_min_tokens=values["disagg_prefill_min_tokens"],
            prefill_max_queued_tokens=values["disagg_prefill_max_queued_tokens"],
            prefill_seconds=values["disagg_prefill_timeout"],
        ),
        kv_block_tokens=values["kv_cache_block_size"],
        use_kv_events=values["kv_events"],
        workers=values["workers"],
        aliases=parse_aliases(values["model_alias"] or []),
        tls=TlsFiles(values["tls_cert_file"], values["tls_key_file"], values["engine_ca_file"]),
        engine_api_key=read_secret(values["engine_api_key_file"]),
        access_log=values["access_log"],
        traces_endpoint=values["otlp_traces_endpoint"],
        api_keys_path=values["api_keys_file"],
        control_routes=values["engine_control_routes"],
        resume_streams=values["stream_resume"],
        limits=Limits(max_body_bytes=values["max_body_bytes"]),
        timeouts=_timeouts(values),
    )


def _timeouts(values: dict[str, Any]) -> Timeouts:
    return Timeouts(
        connect_seconds=values["connect_timeout"],
        first_byte_seconds=values["request_timeout"],
        idle_seconds=values["idle_timeout"],
        drain_seconds=values["drain_timeout"],
        probe_interval_seconds=values["health_interval"],
        start_grace_seconds=values["engine_start_grace"],
    )


def _discovery(values: dict[str, Any]) -> DiscoverySources:
    discovery = DiscoverySources(
        tuple(values["engines_file"] or ()),
        tuple(values["engine_dns"] or ()),
        tuple(values["engine_k8s_service"] or ()),
        values["kubernetes_api"].rstrip("/"),
        values["discovery_interval"],
    )
    for url in discovery.dns:
        parse_engine_url(url)
    for service in discovery.services:
        parse_service(service)
    for source in map(FileSource, discovery.files):
        try:
            source.read()
        except DiscoveryError as error:
            raise ConfigError(f"{source.name}: {error}") from None
    return discovery


def _check_files(values: dict[str, Any]) -> None:
    """Mistakes in files are told now, and once."""
    if values["api_keys_file"]:
        KeyRing(Path(values["api_keys_file"]), 0.0, parse_slo_classes(values["slo_class"] or []))
    if values["tls_key_file"] and not values["tls_cert_file"]:
        raise ConfigError("--tls-key-file is the key of a certificate; name that with --tls-cert-file")
    if values["tls_cert_file"]:
        ServerTls(values["tls_cert_file"], values["tls_key_file"])
    client_context(values["engine_ca_file"])


def read_secret(path: str) -> str:
    """The one line of a file; empty for no file. Raises ConfigError."""
    if not path:
        return ""
    try:
        text = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --engine-api-key-file {path} ({error}); name a file with the key") from None
    if not text.isascii() or not text.isprintable() or not text or " " in text:
        raise ConfigError(f"--engine-api-key-file {path} holds no key; write the key into it, on one line")
    return text


def _warnings(values: dict[str, Any], config: ProxyConfig) -> Iterator[str]:
    """What works, and is mostly not meant so."""
    tls_key = "tls_key_file" if config.tls.key_file else "tls_cert_file"
    for name in ("engine_api_key_file", "replica_sync_key_file", tls_key):
        if values[name] and os.stat(values[name]).st_mode & stat.S_IROTH:
            yield f"--{name.replace('_', '-')} {values[name]} can be read by everybody on this host; chmod o-r it"
    if not config.discovery and all(engine.options.role == "prefill" for engine in config.engines):
        what = "only prefill engines, which answer no client," if config.engines else "no engine"
        yield f"{what} given: every request gets 503 until one is added (POST /engines on the admin listener)"
    if config.router_mode != "kv" and (config.routing.overlap_weight is not None or config.routing.temperature):
        yield f"--kv-overlap-score-weight and --router-temperature count in mode kv, not in {config.router_mode}"


def _run(**values: Any) -> None:
    """Route requests to vLLM and SGLang engines by what their KV caches hold."""
    config = read_config(values)
    for warning in _warnings(values, config):
        log.warning("%s", warning)
    _serve(config)


def _application() -> typer.Typer:
    """The command; its flags come from the table, not from a signature of fourteen parameters."""
    parameters = [flag.parameter() for flag in FLAGS]
    _run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    _run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(_run)
    return app


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code: 0, or 2 for a mistake in the call."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="dynamo-proxy: %(message)s")
    try:
        result: Any = _application()(arguments, prog_name="dynamo-proxy", standalone_mode=False)
    except ProxyError as error:
        return _complain(str(error))
    except Exception as error:
        # Usage errors of the command-line library, whichever of its bundled or shared forms raised them.
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        return _complain(f"{' '.join(format_message().split())} (dynamo-proxy --help lists the flags)")
    return result if isinstance(result, int) else 0


def _serve(config: ProxyConfig) -> None:
    import uvloop

    if config.workers > 1:
        from .supervisor import supervise

        uvloop.run(supervise(config))
    else:
        from .server import serve

        uvloop.run(serve(config))


def _complain(message: str) -> int:
    typer.echo(f"dynamo-proxy: {message}", err=True)
    return 2
