"""The `dynamo-proxy` command: flags to one frozen configuration, mistakes to one line on stderr."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer

from .config import (
    MIB,
    Limits,
    ProxyConfig,
    Timeouts,
    parse_engine_urls,
    parse_router_mode,
    require_range,
)
from .errors import ProxyError

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
_DAY = 86_400.0


@app.command()
def run(
    engine: Annotated[
        list[str] | None, typer.Option(help="An engine, http://HOST:PORT; repeat for each")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one")] = 8080,
    admin_host: Annotated[str, typer.Option(help="Address of the admin listener")] = "127.0.0.1",
    admin_port: Annotated[int, typer.Option(help="Port of the admin listener; 0 turns it off")] = 8081,
    router_mode: Annotated[str, typer.Option(help="kv, round-robin, random or least-loaded")] = "kv",
    kv_cache_block_size: Annotated[
        int, typer.Option(help="Tokens per KV block until an engine tells its own")
    ] = 16,
    kv_events: Annotated[bool, typer.Option(help="Subscribe to the engines' KV events")] = True,
    max_body_bytes: Annotated[int, typer.Option(help="Largest request body")] = 32 * MIB,
    connect_timeout: Annotated[float, typer.Option(help="Seconds to connect to an engine")] = 5.0,
    request_timeout: Annotated[float, typer.Option(help="Seconds until the first byte of an answer")] = 300.0,
    idle_timeout: Annotated[float, typer.Option(help="Seconds without a byte within an answer")] = 300.0,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds that requests in flight get at shutdown")
    ] = 30.0,
    health_interval: Annotated[float, typer.Option(help="Seconds between health probes")] = 2.0,
) -> None:
    """Route requests to vLLM and SGLang engines by what their KV caches hold."""
    for flag, value, low, high in (
        ("--port", port, 0, 65535),
        ("--admin-port", admin_port, 0, 65535),
        ("--kv-cache-block-size", kv_cache_block_size, 1, 65536),
        ("--max-body-bytes", max_body_bytes, 1024, 4096 * MIB),
        ("--connect-timeout", connect_timeout, 0.01, 600),
        ("--request-timeout", request_timeout, 0.01, _DAY),
        ("--idle-timeout", idle_timeout, 0.01, _DAY),
        ("--drain-timeout", drain_timeout, 0, _DAY),
        ("--health-interval", health_interval, 0.05, 3600),
    ):
        require_range(flag, value, low, high)
    timeouts = Timeouts(
        connect_seconds=connect_timeout,
        first_byte_seconds=request_timeout,
        idle_seconds=idle_timeout,
        drain_seconds=drain_timeout,
        probe_interval_seconds=health_interval,
    )
    config = ProxyConfig(
        engines=parse_engine_urls(engine or []),
        host=host,
        port=port,
        admin_host=admin_host,
        admin_port=admin_port or None,
        router_mode=parse_router_mode(router_mode),
        kv_block_tokens=kv_cache_block_size,
        use_kv_events=kv_events,
        limits=Limits(max_body_bytes=max_body_bytes),
        timeouts=timeouts,
    )
    _serve(config)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code: 0, or 2 for a mistake in the call."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="dynamo-proxy: %(message)s")
    try:
        result: Any = app(arguments, prog_name="dynamo-proxy", standalone_mode=False)
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

    from .server import serve

    uvloop.run(serve(config))


def _complain(message: str) -> int:
    typer.echo(f"dynamo-proxy: {message}", err=True)
    return 2
