"""The flags of a launch line, read by the engines' own parser: what is to be examined, or what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dynamo_connectors.config import (
    GIGABYTE,
    NVME_SSD,
    OBJECT_STORE,
    KvbmConfig,
    parse_config,
    refuse_tiny_tiers,
    tiers_meant,
)
from dynamo_connectors.host_limits import read_secret
from dynamo_connectors.peer_config import PEER_SETTINGS, PeerConfig

#: What is tried where a tier's place is given without its size.
SOME_GB = 1.0
_SIZES = {NVME_SSD: "kvbm_nvme_gb", OBJECT_STORE: "kvbm_object_gb"}


@dataclass(frozen=True)
class Plan:
    """What the operator means to run; None where nothing was said. GB are 10**9 bytes."""

    host_dram_gb: float | None = None
    nvme_path: Path | None = None
    nvme_gb: float | None = None
    object_url: str | None = None
    object_endpoint_url: str | None = None
    peer: PeerConfig = field(default_factory=PeerConfig)
    #: The settings as they were given, and the tiers they mean.
    given: Mapping[str, object] = field(default_factory=dict)
    tiers: tuple[str, ...] = ()


def plan_of(given: Mapping[str, object]) -> Plan:
    """Raises `ConfigError` with the engine's line for the first setting that is wrong.

    SGLang, and who only asks about one directory or bucket, lists no tiers: the settings tell them then. Nor has SGLang
    a --kvbm-role.
    """
    if not given:
        return Plan()
    if "kvbm_storage_tiers" in given:
        config = _checked(given)
        return _plan(given, config, config.host_dram_bytes)
    tiers, has_role = tiers_meant(given), "kvbm_role" in given
    sizes = {setting: SOME_GB for tier, setting in _SIZES.items() if tier in tiers}
    meant = {setting: value for setting, value in given.items() if setting not in PEER_SETTINGS or has_role}
    if not has_role and (secret := given.get("kvbm_peer_secret_file")):
        read_secret(PeerConfig(secret_file=Path(str(secret))))
    config = _checked({**sizes, **meant, "kvbm_storage_tiers": ",".join(tiers)})
    return _plan(given, config, config.host_dram_bytes if "kvbm_host_dram_gb" in given else 0)


def _checked(settings: Mapping[str, object]) -> KvbmConfig:
    config = parse_config(settings)
    refuse_tiny_tiers(config)
    read_secret(config.peer)
    return config


def _plan(given: Mapping[str, object], config: KvbmConfig, host_dram_bytes: int) -> Plan:
    return Plan(
        host_dram_gb=host_dram_bytes / GIGABYTE if host_dram_bytes else None,
        nvme_path=config.nvme_path,
        nvme_gb=config.nvme_bytes / GIGABYTE if config.nvme_path is not None else None,
        object_url=config.object_url,
        object_endpoint_url=config.object_endpoint_url,
        peer=config.peer,
        given=given,
        tiers=config.storage_tiers,
    )
