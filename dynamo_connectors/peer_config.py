"""The settings of an engine's part in a fleet of prefill and decode engines, parsed once at the edge. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from dynamo_connectors.errors import ConfigError

PREFILL, DECODE, BOTH = "prefill", "decode", "both"
DEFAULT_PEER_PORT = 5700
DEFAULT_PEER_DEADLINE_MS = 10_000.0
MOST_PEER_DEADLINE_MS = 600_000.0
DEFAULT_PEER_HBM_GB = 1.0
_MOST_PEER_HBM_GB = 1e4

#: Setting -> what `--help` says; part of `config.SETTINGS`.
PEER_SETTINGS = {
    "kvbm_role": "Hands KV over between engines: prefill lets others read it, decode reads it; or both (default none).",
    "kvbm_peer_host": "Address that other engines reach this one at (default 127.0.0.1).",
    "kvbm_peer_port": f"First port of this engine's workers, one each (default {DEFAULT_PEER_PORT}).",
    "kvbm_peer_secret_file": "File with the secret that all engines of the fleet share; needed beyond one host.",
    "kvbm_peer_hbm_gb": (
        "HBM of each GPU that KV passes through between engines, in GB, beside --gpu-memory-utilization; 0 is none "
        f"(default {DEFAULT_PEER_HBM_GB:g} on GPUs)."
    ),
    "kvbm_peer_deadline_ms": (
        f"Longest wait for another engine's KV in ms; later is computed (default {DEFAULT_PEER_DEADLINE_MS:g})."
    ),
}


@dataclass(frozen=True)
class PeerConfig:
    role: str = ""
    host: str = "127.0.0.1"
    port: int = DEFAULT_PEER_PORT
    secret_file: Path | None = None
    deadline_seconds: float = DEFAULT_PEER_DEADLINE_MS / 1000
    #: None: as much as is usual on the device.
    hbm_bytes: int | None = None

    def hbm_bytes_on(self, device: str) -> int:
        """HBM for each of what it does, to serve and to read."""
        usual = int(DEFAULT_PEER_HBM_GB * 1e9) if device == "cuda" else 0
        return (usual if self.hbm_bytes is None else self.hbm_bytes) // (2 if self.role == BOTH else 1)

    @property
    def serves(self) -> bool:
        return self.role in (PREFILL, BOTH)

    @property
    def is_local(self) -> bool:
        """Without a secret nobody beyond this host is believed."""
        return self.secret_file is None

    @property
    def reads(self) -> bool:
        return self.role in (DECODE, BOTH)


def parse_peer_config(
    ours: Mapping[str, object], has_tiers: bool, keeps_all: bool, compresses: bool = False
) -> PeerConfig:
    """`keeps_all`: host memory takes every block that is computed; `compresses`: and not as it is.

    Raises `ConfigError` with one line for the first setting that is wrong, naming its flag."""
    given = [key for key in PEER_SETTINGS if key in ours]
    if not given:
        return PeerConfig()
    if "kvbm_role" not in ours:
        raise ConfigError(f"--{given[0].replace('_', '-')} means nothing without --kvbm-role; add it, or drop the flag")
    role = str(ours["kvbm_role"]).strip()
    if role not in (PREFILL, DECODE, BOTH):
        raise ConfigError(f"--kvbm-role {role!r} is unknown; write {PREFILL}, {DECODE} or {BOTH}")
    if not has_tiers:
        raise ConfigError(
            "--kvbm-role needs the host_dram tier: blocks pass through it; add it to --kvbm-storage-tiers"
        )
    if role != DECODE and not keeps_all:
        raise ConfigError(
            f"--kvbm-role {role} hands over what host memory has taken, which is not all with --kvbm-dram-min-touches "
            "above 1 or --kvbm-offload-ratio below 1; drop these"
        )
    host = str(ours.get("kvbm_peer_host", "127.0.0.1")).strip()
    if host in ("", "0.0.0.0", "::"):
        raise ConfigError(f"--kvbm-peer-host {host!r} leads nowhere; write the address that other engines reach")
    secret = ours.get("kvbm_peer_secret_file")
    if secret is None and not is_this_host(host):
        raise ConfigError(
            f"--kvbm-peer-host {host} is open to other hosts: give every engine the same --kvbm-peer-secret-file"
        )
    hbm_gb = _hbm_gb(ours)
    if compresses and hbm_gb:
        raise ConfigError(
            "--kvbm-peer-hbm-gb is for blocks as they are, and --kvbm-compression packs them; drop one of the two"
        )
    return PeerConfig(
        role=role,
        hbm_bytes=0 if compresses else None if hbm_gb is None else int(hbm_gb * 1e9),
        host=host,
        port=_number(ours, "kvbm_peer_port", DEFAULT_PEER_PORT, 65_535, whole=True),
        secret_file=None if secret is None else Path(str(secret)),
        deadline_seconds=_number(ours, "kvbm_peer_deadline_ms", DEFAULT_PEER_DEADLINE_MS, MOST_PEER_DEADLINE_MS) / 1000,
    )


def _hbm_gb(ours: Mapping[str, object]) -> float | None:
    if "kvbm_peer_hbm_gb" not in ours:
        return None
    value = ours["kvbm_peer_hbm_gb"]
    try:
        number = float(str(value))
    except ValueError:
        number = -1.0
    if not 0 <= number <= _MOST_PEER_HBM_GB:
        raise ConfigError(f"--kvbm-peer-hbm-gb {value!r} must be a number of GB, 0 for none")
    return number


def is_this_host(host: str) -> bool:
    """Whether an address can be nobody's but this host's."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _number(ours: Mapping[str, object], key: str, default: float, most: float, whole: bool = False) -> int:
    value = ours.get(key, default)
    try:
        number = float(str(value))
    except ValueError:
        number = -1.0
    if not 1 <= number <= most or (whole and number != int(number)):
        raise ConfigError(
            f"--{key.replace('_', '-')} {value!r} must be a {'whole ' if whole else ''}number from 1 to {most:g}"
        )
    return int(number)
