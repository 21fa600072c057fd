"""The block manager's settings, parsed once at the edge into one frozen record.

The same keys serve every spelling: `--kvbm-*` flags, vLLM's `kv_connector_extra_config` and SGLang's extra config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dynamo_connectors.errors import ConfigError

GIGABYTE = 10**9
#: Less would not hold one block of any served model.
SMALLEST_TIER_BYTES = 10**6
HBM, HOST_DRAM, NVME_SSD = "hbm", "host_dram", "nvme_ssd"
#: In order of speed. A tier may only be left out at the end: KV reaches the disk through host memory.
TIER_ORDER = (HBM, HOST_DRAM, NVME_SSD)
DEFAULT_HOST_DRAM_GB = 4.0

#: Setting -> what `--help` says. The flag is `--` + the setting with dashes.
SETTINGS = {
    "kvbm_storage_tiers": "Tiers that may hold KV, fastest first: hbm,host_dram[,nvme_ssd] (default hbm,host_dram).",
    "kvbm_host_dram_gb": f"Host memory for KV in GB, for all workers (default {DEFAULT_HOST_DRAM_GB:g}).",
    "kvbm_offload_ratio": "Share of each request's KV that may leave HBM, above 0 and at most 1 (default 1).",
    "kvbm_nvme_path": "Directory of the nvme_ssd tier.",
    "kvbm_nvme_gb": "Disk space for KV in GB, for all workers.",
}


def flag_of(setting: str) -> str:
    return "--" + setting.replace("_", "-")


@dataclass(frozen=True)
class KvbmConfig:
    """Sizes are for the whole engine; each worker gets an equal share."""

    storage_tiers: tuple[str, ...] = (HBM, HOST_DRAM)
    host_dram_bytes: int = 0
    offload_ratio: float = 1.0
    nvme_path: Path | None = None
    nvme_bytes: int = 0

    @property
    def has_tiers(self) -> bool:
        """Whether anything below HBM may hold KV."""
        return len(self.storage_tiers) > 1


def parse_config(settings: Mapping[str, object]) -> KvbmConfig:
    """Raises `ConfigError` with one line for the first setting that is wrong, naming its flag.

    Keys that do not start with `kvbm_` belong to somebody else and are left alone.
    """
    ours = {key: value for key, value in settings.items() if key.startswith("kvbm_") and value is not None}
    for key in ours:
        if key not in SETTINGS:
            raise ConfigError(f"unknown setting {key}; known: {', '.join(SETTINGS)}")
    tiers = _parse_tiers(ours.get("kvbm_storage_tiers", f"{HBM},{HOST_DRAM}"))
    _refuse_settings_without_tier(ours, tiers)
    dram_gb = _parse_number(ours, "kvbm_host_dram_gb", DEFAULT_HOST_DRAM_GB)
    nvme_path = ours.get("kvbm_nvme_path")
    if NVME_SSD in tiers:
        for key in ("kvbm_nvme_path", "kvbm_nvme_gb"):
            if key not in ours:
                raise ConfigError(f"the nvme_ssd tier needs {flag_of(key)}")
    if nvme_path is not None and not str(nvme_path).strip():
        raise ConfigError("--kvbm-nvme-path is empty; name a directory")
    ratio = _parse_number(ours, "kvbm_offload_ratio", 1.0)
    if ratio > 1:
        raise ConfigError(f"--kvbm-offload-ratio {ratio:g} is above 1; it is the share of KV that may leave HBM")
    return KvbmConfig(
        storage_tiers=tiers,
        host_dram_bytes=int(dram_gb * GIGABYTE) if HOST_DRAM in tiers else 0,
        offload_ratio=ratio,
        nvme_path=Path(str(nvme_path)) if nvme_path is not None else None,
        nvme_bytes=int(_parse_number(ours, "kvbm_nvme_gb", 1.0) * GIGABYTE) if NVME_SSD in tiers else 0,
    )


def refuse_tiny(setting: str, size_bytes: int) -> None:
    """Raises `ConfigError` for a size that can only be a slip of the unit, before it costs an engine start."""
    if size_bytes < SMALLEST_TIER_BYTES:
        raise ConfigError(
            f"{flag_of(setting)} {size_bytes / GIGABYTE:g} is less than a megabyte; it is in GB, raise it"
        )


def _parse_tiers(value: object) -> tuple[str, ...]:
    names = value if isinstance(value, (list, tuple)) else str(value).split(",")
    tiers = tuple(str(name).strip() for name in names)
    for name in tiers:
        if name not in TIER_ORDER:
            raise ConfigError(f"--kvbm-storage-tiers names an unknown tier {name!r}; known: {', '.join(TIER_ORDER)}")
    if not tiers or tiers != TIER_ORDER[: len(tiers)]:
        raise ConfigError(
            f"--kvbm-storage-tiers {','.join(tiers)} is not an order KV can take; "
            f"write {' or '.join(','.join(TIER_ORDER[:count]) for count in (1, 2, 3))}"
        )
    return tiers


def _refuse_settings_without_tier(ours: Mapping[str, object], tiers: tuple[str, ...]) -> None:
    needed = {"kvbm_host_dram_gb": HOST_DRAM, "kvbm_nvme_path": NVME_SSD, "kvbm_nvme_gb": NVME_SSD}
    for key, tier in needed.items():
        if key in ours and tier not in tiers:
            raise ConfigError(
                f"{flag_of(key)} contradicts --kvbm-storage-tiers {','.join(tiers)}: add {tier} there, or drop the flag"
            )


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
