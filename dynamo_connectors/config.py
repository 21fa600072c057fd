"""The block manager's settings, parsed once at the edge into one frozen record.

The same keys serve every spelling: `--kvbm-*` flags, vLLM's `kv_connector_extra_config` and SGLang's extra config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from dynamo_connectors.errors import ConfigError
from dynamo_connectors.peer_config import PEER_SETTINGS, PeerConfig, parse_peer_config

GIGABYTE = 10**9
#: Less would not hold one block of any served model.
SMALLEST_TIER_BYTES = 10**6
HBM, HOST_DRAM, NVME_SSD, OBJECT_STORE = "hbm", "host_dram", "nvme_ssd", "object_store"
#: Other engines' blocks. Not among the tiers that keep blocks: a request brings the ticket to what it may read.
PEER = "peer"
#: In order of speed. KV reaches every tier below through host memory; the disk and the object store may be left out.
TIER_ORDER = (HBM, HOST_DRAM, NVME_SSD, OBJECT_STORE)
LRU, ARC = "lru", "arc"
OFF, FP8, INT8 = "off", "fp8", "int8"
DEFAULT_HOST_DRAM_GB = 4.0
DEFAULT_OBJECT_DEADLINE_MS = 1000.0
#: No request waits longer for a cache, and no request to the store takes longer.
MOST_OBJECT_DEADLINE_MS = 60_000.0
#: More would be a slip: no prefix is worth keeping only after so many requests have computed it.
MOST_TOUCHES = 255

#: Setting -> what `--help` says. The flag is `--` + the setting with dashes.
SETTINGS = {
    "kvbm_storage_tiers": (
        "Tiers that may hold KV, fastest first: hbm,host_dram[,nvme_ssd][,object_store] (default hbm,host_dram)."
    ),
    "kvbm_host_dram_gb": f"Host memory for KV in GB, for all workers (default {DEFAULT_HOST_DRAM_GB:g}).",
    "kvbm_offload_ratio": "Share of each request's KV that may leave HBM, above 0 and at most 1 (default 1).",
    "kvbm_eviction_policy": "What a full tier gives up first: lru or arc (default lru).",
    "kvbm_compression": (
        "Keep KV below HBM in one byte a value: off, fp8 or int8 (default off). Half the bytes; answers may change."
    ),
    "kvbm_load_gate": "on refuses a load that is expected to be slower than computing again; on or off (default on).",
    "kvbm_dram_min_touches": "Requests that must have used a block before host memory keeps it (default 1).",
    "kvbm_nvme_path": "Directory of the nvme_ssd tier.",
    "kvbm_nvme_gb": "Disk space for KV in GB, for all workers.",
    "kvbm_nvme_min_touches": "Requests that must have used a block before the disk keeps it (default 2).",
    "kvbm_object_url": "Place of the object_store tier: s3://bucket/prefix.",
    "kvbm_object_endpoint_url": "S3 service, for example http://host:9000 (default: what the AWS_* environment says).",
    "kvbm_object_gb": "Space in the object store for KV in GB, for all workers.",
    "kvbm_object_min_touches": "Requests that must have used a block before the object store keeps it (default 2).",
    "kvbm_object_deadline_ms": (
        f"Longest wait for the object store in ms; later is a miss (default {DEFAULT_OBJECT_DEADLINE_MS:g})."
    ),
    **PEER_SETTINGS,
}
#: A setting means nothing without its tier.
_TIER_OF_PREFIX = {
    "kvbm_compression": HOST_DRAM,
    "kvbm_host_dram_": HOST_DRAM,
    "kvbm_dram_": HOST_DRAM,
    "kvbm_nvme_": NVME_SSD,
    "kvbm_object_": OBJECT_STORE,
}
_NEEDED = {NVME_SSD: ("kvbm_nvme_path", "kvbm_nvme_gb"), OBJECT_STORE: ("kvbm_object_url", "kvbm_object_gb")}


def flag_of(setting: str) -> str:
    return "--" + setting.replace("_", "-")


@dataclass(frozen=True)
class KvbmConfig:
    """Sizes are for the whole engine; each worker gets an equal share."""

    storage_tiers: tuple[str, ...] = (HBM, HOST_DRAM)
    host_dram_bytes: int = 0
    offload_ratio: float = 1.0
    eviction_policy: str = LRU
    #: None: the bytes that the engine computed.
    compression: str | None = None
    load_gate: bool = True
    dram_min_touches: int = 1
    nvme_path: Path | None = None
    nvme_bytes: int = 0
    nvme_min_touches: int = 2
    object_url: str | None = None
    object_endpoint_url: str | None = None
    object_bytes: int = 0
    object_min_touches: int = 2
    object_deadline_seconds: float = DEFAULT_OBJECT_DEADLINE_MS / 1000
    peer: PeerConfig = field(default_factory=PeerConfig)

    @property
    def has_tiers(self) -> bool:
        """Whether anything below HBM may hold KV."""
        return len(self.storage_tiers) > 1

    @property
    def min_touches(self) -> dict[str, int]:
        """Tier -> how many requests must have used a block before the tier takes it."""
        touches = {
            HOST_DRAM: self.dram_min_touches,
            NVME_SSD: self.nvme_min_touches,
            OBJECT_STORE: self.object_min_touches,
        }
        return {tier: touches[tier] for tier in self.storage_tiers if tier in touches}


def parse_config(settings: Mapping[str, object]) -> KvbmConfig:
    """Raises `ConfigError` with one line for the first setting that is wrong, naming its flag.

    Keys that do not start with `kvbm_` belong to somebody else and are left alone.
    """
    ours = {key: value for key, value in settings.items() if key.startswith("kvbm_") and value is not None}
    for key in ours:
        if key not in SETTINGS:
            raise ConfigError(f"unknown setting {key}; known: {', '.join(SETTINGS)}")
    tiers = _parse_tiers(ours.get("kvbm_storage_tiers", f"{HBM},{HOST_DRAM}"))
    _check_tiers_and_settings(ours, tiers)
    ratio = _parse_number(ours, "kvbm_offload_ratio", 1.0)
    if ratio > 1:
        raise ConfigError(f"--kvbm-offload-ratio {ratio:g} is above 1; it is the share of KV that may leave HBM")
    deadline_ms = _parse_number(ours, "kvbm_object_deadline_ms", DEFAULT_OBJECT_DEADLINE_MS)
    if deadline_ms > MOST_OBJECT_DEADLINE_MS:
        raise ConfigError(f"--kvbm-object-deadline-ms {deadline_ms:g} is above {MOST_OBJECT_DEADLINE_MS:g}; lower it")
    touches = {tier: _parse_touches(ours, f"kvbm_{tier}_min_touches") for tier in ("dram", "nvme", "object")}
    compression = _parse_choice(ours, "kvbm_compression", (OFF, FP8, INT8))
    return KvbmConfig(
        storage_tiers=tiers,
        host_dram_bytes=_parse_bytes(ours, "kvbm_host_dram_gb", DEFAULT_HOST_DRAM_GB) if HOST_DRAM in tiers else 0,
        offload_ratio=ratio,
        eviction_policy=_parse_choice(ours, "kvbm_eviction_policy", (LRU, ARC)),
        compression=None if compression == OFF else compression,
        load_gate=_parse_choice(ours, "kvbm_load_gate", ("on", "off")) == "on",
        dram_min_touches=touches["dram"],
        nvme_path=_parse_directory(ours["kvbm_nvme_path"]) if NVME_SSD in tiers else None,
        nvme_bytes=_parse_bytes(ours, "kvbm_nvme_gb", 1.0) if NVME_SSD in tiers else 0,
        nvme_min_touches=touches["nvme"],
        object_url=_parse_object_url(ours) if OBJECT_STORE in tiers else None,
        object_endpoint_url=_parse_endpoint_url(ours),
        object_bytes=_parse_bytes(ours, "kvbm_object_gb", 1.0) if OBJECT_STORE in tiers else 0,
        object_min_touches=touches["object"],
        object_deadline_seconds=deadline_ms / 1000,
        peer=parse_peer_config(ours, len(tiers) > 1, ratio == 1.0 and touches["dram"] == 1, compression != OFF),
    )


def refuse_tiny(setting: str, size_bytes: int) -> None:
    """Raises `ConfigError` for a size that can only be a slip of the unit, before it costs an engine start."""
    if size_bytes < SMALLEST_TIER_BYTES:
        raise ConfigError(
            f"{flag_of(setting)} {size_bytes / GIGABYTE:g} is less than a megabyte; it is in GB, raise it"
        )


def refuse_tiny_tiers(config: KvbmConfig) -> None:
    """Raises `ConfigError` for the first tier of `config` that is tiny."""
    if HOST_DRAM in config.storage_tiers:
        refuse_tiny("kvbm_host_dram_gb", config.host_dram_bytes)
    if NVME_SSD in config.storage_tiers:
        refuse_tiny("kvbm_nvme_gb", config.nvme_bytes)


def tiers_meant(settings: Mapping[str, object]) -> tuple[str, ...]:
    """The tiers that somebody means who gives their settings and does not list them."""
    named = {tier for key in settings for prefix, tier in _TIER_OF_PREFIX.items() if key.startswith(prefix)}
    return tuple(tier for tier in TIER_ORDER if tier in (HBM, HOST_DRAM) or tier in named)


def _parse_tiers(value: object) -> tuple[str, ...]:
    names = value if isinstance(value, (list, tuple)) else str(value).split(",")
    tiers = tuple(str(name).strip() for name in names)
    for name in tiers:
        if name not in TIER_ORDER:
            raise ConfigError(f"--kvbm-storage-tiers names an unknown tier {name!r}; known: {', '.join(TIER_ORDER)}")
    in_order = tuple(name for name in TIER_ORDER if name in tiers)
    if tiers != in_order or tiers[:2] not in (TIER_ORDER[:1], TIER_ORDER[:2]):
        raise ConfigError(
            f"--kvbm-storage-tiers {','.join(tiers)} is not an order KV can take; "
            "write hbm or hbm,host_dram[,nvme_ssd][,object_store]"
        )
    return tiers


def _check_tiers_and_settings(ours: Mapping[str, object], tiers: tuple[str, ...]) -> None:
    """Every setting has its tier, and every tier the settings without which it cannot exist."""
    for key in ours:
        tier = next((tier for prefix, tier in _TIER_OF_PREFIX.items() if key.startswith(prefix)), None)
        if tier is not None and tier not in tiers:
            raise ConfigError(
                f"{flag_of(key)} contradicts --kvbm-storage-tiers {','.join(tiers)}: add {tier} there, or drop the flag"
            )
    for tier in tiers:
        for key in _NEEDED.get(tier, ()):
            if key not in ours:
                raise ConfigError(f"the {tier} tier needs {flag_of(key)}")
    if NVME_SSD in tiers and not str(ours["kvbm_nvme_path"]).strip():
        raise ConfigError("--kvbm-nvme-path is empty; name a directory")


def _parse_directory(value: object) -> Path:
    """No shell expands the ~ in --flag=~/kv, nor in a file."""
    try:
        return Path(str(value)).expanduser()
    except RuntimeError:
        raise ConfigError(f"--kvbm-nvme-path {value} names the home of a user who has none here") from None


def _parse_object_url(ours: Mapping[str, object]) -> str:
    url = str(ours["kvbm_object_url"]).strip()
    parts = _split_url("kvbm_object_url", url)
    if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment or ":" in parts.netloc:
        raise ConfigError(f"--kvbm-object-url {url!r} is not a place in an object store; write s3://bucket/prefix")
    return url.rstrip("/")


def _parse_endpoint_url(ours: Mapping[str, object]) -> str | None:
    if "kvbm_object_endpoint_url" not in ours:
        return None
    url = str(ours["kvbm_object_endpoint_url"]).strip()
    parts = _split_url("kvbm_object_endpoint_url", url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"--kvbm-object-endpoint-url {url!r} is not a service; write http://host:port")
    return url.rstrip("/")


def _split_url(key: str, url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for what is no number
    except ValueError:
        raise ConfigError(f"{flag_of(key)} {url!r} cannot be read as a URL") from None
    if url.split() != [url]:
        raise ConfigError(f"{flag_of(key)} {url!r} cannot be read as a URL")
    if "@" in parts.netloc:  # not repeated: logs keep what is printed
        raise ConfigError(f"{flag_of(key)} holds a secret; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
    return parts


def _parse_choice(ours: Mapping[str, object], key: str, choices: tuple[str, ...]) -> str:
    """One of `choices`, the first of which is the default."""
    value = ours.get(key, choices[0])
    # YAML reads a bare `on` as true.
    word = {"True": "on", "False": "off"}.get(str(value), str(value).strip())
    if word not in choices:
        raise ConfigError(f"{flag_of(key)} {value!r} is unknown; write {' or '.join(choices)}")
    return word


def _parse_touches(ours: Mapping[str, object], key: str) -> int:
    default = getattr(KvbmConfig, key.removeprefix("kvbm_"))
    number = _parse_number(ours, key, default)
    if number != int(number) or number > MOST_TOUCHES:
        raise ConfigError(f"{flag_of(key)} {number:g} must be a whole number from 1 to {MOST_TOUCHES}")
    return int(number)


def _parse_bytes(ours: Mapping[str, object], key: str, default_gb: float) -> int:
    return int(_parse_number(ours, key, default_gb) * GIGABYTE)


def _parse_number(ours: Mapping[str, object], key: str, default: float) -> float:
    value = ours.get(key, default)
    try:
        number = float(str(value))
    except ValueError:
        raise ConfigError(f"{flag_of(key)} {value!r} is not a number") from None
    # In bytes too: 1e300 GB is a number, and 1e309 bytes are not.
    if not math.isfinite(number * GIGABYTE) or number <= 0:
        raise ConfigError(f"{flag_of(key)} {number:g} must be a finite number above 0")
    return number
