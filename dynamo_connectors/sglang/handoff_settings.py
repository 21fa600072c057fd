"""What a user asks of the hand-off between SGLang's prefill and decode engines. Imports no engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from dynamo_connectors.config import flag_of
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.host_limits import read_secret
from dynamo_connectors.peer_config import DEFAULT_PEER_DEADLINE_MS, MOST_PEER_DEADLINE_MS, PeerConfig

BACKEND = "dynamo"
BACKEND_FLAG = "--disaggregation-transfer-backend"
HANDOFF_SETTINGS = {
    "kvbm_peer_secret_file": f"({BACKEND}) File with the secret that all engines share; needed beyond one host.",
    "kvbm_peer_deadline_ms": (
        f"({BACKEND}) Longest silence of the other engine, and longest transfer, in ms "
        f"(default {DEFAULT_PEER_DEADLINE_MS:g})."
    ),
}
#: The launcher tells its schedulers here.
VARIABLE = "DYNAMO_SGLANG_HANDOFF"
#: The engine shall hold an aborted request's pages for as long as something may write to them, however long; and not
#: send a cached prefix ahead: all is read at the end, and its CPU engine ends there for want of a CUDA event.
_ENGINE_VARIABLES = {
    "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX": "0",
    "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE": "1",
    "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT": "1e9",
}
_LEAST_DEADLINE_MS = 1000.0


@dataclass(frozen=True)
class HandoffConfig:
    secret_file: Path | None = None
    deadline_seconds: float = DEFAULT_PEER_DEADLINE_MS / 1000

    @property
    def is_local(self) -> bool:
        """Without a secret nobody beyond this host is believed."""
        return self.secret_file is None

    def secret(self) -> bytes:
        """Raises `ConfigError`."""
        return read_secret(PeerConfig(secret_file=self.secret_file))


def parse_handoff(given: Mapping[str, object]) -> HandoffConfig:
    """Raises `ConfigError` with one line for the first setting that is wrong."""
    secret = given.get("kvbm_peer_secret_file")
    value = given.get("kvbm_peer_deadline_ms", DEFAULT_PEER_DEADLINE_MS)
    try:
        deadline_ms = float(str(value))
    except ValueError:
        deadline_ms = -1.0
    if not _LEAST_DEADLINE_MS <= deadline_ms <= MOST_PEER_DEADLINE_MS:
        raise ConfigError(
            f"{flag_of('kvbm_peer_deadline_ms')} {value!r} must be a number from {_LEAST_DEADLINE_MS:g} to "
            f"{MOST_PEER_DEADLINE_MS:g}"
        )
    config = HandoffConfig(None if secret is None else Path(str(secret)).absolute(), deadline_ms / 1000)
    config.secret()
    return config


def translate_handoff(launch: object, flags: Mapping[str, object], variables: MutableMapping[str, str]) -> bool:
    """Tells the schedulers, through `variables`. False when the launch does not ask for us. Raises `ConfigError`."""
    given = {key: value for key, value in flags.items() if value is not None}
    if getattr(launch, "disaggregation_transfer_backend", None) != BACKEND:
        if given:
            raise ConfigError(f"{flag_of(next(iter(given)))} needs {BACKEND_FLAG} {BACKEND}")
        return False
    if (getattr(launch, "disaggregation_mode", None) or "null") == "null":
        raise ConfigError(f"{BACKEND_FLAG} {BACKEND} needs --disaggregation-mode prefill or decode")
    _refuse(launch)
    config = parse_handoff(given)
    told: dict[str, object] = {"kvbm_peer_deadline_ms": config.deadline_seconds * 1000}
    if config.secret_file is not None:
        told |= {"kvbm_peer_secret_file": str(config.secret_file)}
    variables.update({VARIABLE: json.dumps(told), **_ENGINE_VARIABLES})
    return True


def told_handoff(variables: Mapping[str, str]) -> HandoffConfig:
    """What the launcher has told. Raises `ConfigError`."""
    lacking = next((name for name, value in _ENGINE_VARIABLES.items() if variables.get(name) != value), None)
    if lacking is not None or VARIABLE not in variables:
        raise ConfigError(
            f"{lacking or VARIABLE} is not what {BACKEND_FLAG} {BACKEND} needs; do not set it, and start the engine "
            "with its own launcher"
        )
    return parse_handoff(json.loads(variables[VARIABLE]))


def _refuse(launch: object) -> None:
    """What is not built. The engine's own words for a setting that was not given are None, 1 or False."""
    for setting in ("pp_size", "dp_size", "attn_cp_size", "dcp_size"):
        if (getattr(launch, setting, None) or 1) > 1:
            raise ConfigError(f"{BACKEND_FLAG} {BACKEND} works with {flag_of(setting)} 1 only; use 1, or nixl")
    for setting in ("disaggregation_decode_enable_radix_cache", "enable_pd_role_switch", "enable_kv_cache_sharding"):
        if getattr(launch, setting, False):
            raise ConfigError(f"{BACKEND_FLAG} {BACKEND} does not work with {flag_of(setting)}; drop it, or use nixl")
    if getattr(launch, "disaggregation_decode_allocation_policy", None) not in (None, "early"):
        raise ConfigError(f"{BACKEND_FLAG} {BACKEND} needs --disaggregation-decode-allocation-policy early; drop yours")
    if getattr(launch, "device", None) not in (None, "cpu"):
        raise ConfigError(
            f"{BACKEND_FLAG} {BACKEND} works on SGLang's CPU engine only so far: no HBM is registered; use nixl"
        )


def refuse_request(host: object, port: object, room: object) -> str | None:
    """Why a request cannot be handed over, in one line. Some of these end SGLang's decode server."""
    if not isinstance(host, str) or not host:
        return "bootstrap_room without bootstrap_host: name the prefill engine that has the request, too"
    if not isinstance(port, int) or not 1 <= port <= 65535:
        return f"bootstrap_port {port!r} is no port: give that of the prefill engine's --disaggregation-bootstrap-port"
    if not isinstance(room, int) or not 1 <= room < 1 << 63:
        return f"bootstrap_room {room!r} must be a whole number from 1 to 2**63 - 1, new for every attempt"
    return None
