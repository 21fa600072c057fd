"""Words about listening sockets."""

from __future__ import annotations

from .errors import ListenError


def listen_error(flag: str, host: str, port: int, error: OSError) -> ListenError:
    reason = (error.strerror or str(error)).lower()
    if "in use" in str(error).lower():
        reason = "the address is in use"
    return ListenError(f"cannot listen on {host}:{port} ({reason}); choose another address or {flag}")


def banner_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
