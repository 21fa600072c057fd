"""What users may write, and the one line they get when they may not."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from dynamo_connectors.config import GIGABYTE, SETTINGS, KvbmConfig, parse_config
from dynamo_connectors.errors import ConfigError

TIERS, DRAM, RATIO = "kvbm_storage_tiers", "kvbm_host_dram_gb", "kvbm_offload_ratio"
PATH, DISK = "kvbm_nvme_path", "kvbm_nvme_gb"
ALL = "hbm,host_dram,nvme_ssd"
NVME = {TIERS: ALL, PATH: "/data/kv", DISK: 10}

#: Settings, the flag that the line must name, words of its remedy.
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({TIERS: "hbm,tape"}, "--kvbm-storage-tiers", "known: hbm, host_dram, nvme_ssd"),
    ({TIERS: ""}, "--kvbm-storage-tiers", "known: hbm"),
    ({TIERS: []}, "--kvbm-storage-tiers", "write hbm or hbm,host_dram"),
    ({TIERS: 7}, "--kvbm-storage-tiers", "known: hbm"),
    ({TIERS: "hbm\nhost_dram"}, "--kvbm-storage-tiers", "known: hbm"),
    ({TIERS: "host_dram,hbm"}, "--kvbm-storage-tiers", "write hbm or hbm,host_dram"),
    ({TIERS: "host_dram"}, "--kvbm-storage-tiers", "write hbm or hbm,host_dram"),
    ({TIERS: "hbm,nvme_ssd"}, "--kvbm-storage-tiers", "write hbm or hbm,host_dram"),
    ({TIERS: "hbm,host_dram,host_dram"}, "--kvbm-storage-tiers", "write hbm or hbm,host_dram"),
    ({DRAM: 0}, "--kvbm-host-dram-gb", "above 0"),
    ({DRAM: -3}, "--kvbm-host-dram-gb", "above 0"),
    ({DRAM: "-3\n"}, "--kvbm-host-dram-gb", "above 0"),
    ({DRAM: "nan"}, "--kvbm-host-dram-gb", "finite"),
    ({DRAM: float("inf")}, "--kvbm-host-dram-gb", "finite"),
    ({DRAM: "1e400"}, "--kvbm-host-dram-gb", "finite"),
    ({DRAM: 1e300}, "--kvbm-host-dram-gb", "finite"),
    ({DRAM: "lots"}, "--kvbm-host-dram-gb", "number"),
    ({DRAM: "4\nGB"}, "--kvbm-host-dram-gb", "number"),
    ({DRAM: ""}, "--kvbm-host-dram-gb", "number"),
    ({DRAM: True}, "--kvbm-host-dram-gb", "number"),
    ({TIERS: "hbm", DRAM: 4}, "--kvbm-host-dram-gb", "add host_dram there, or drop the flag"),
    ({RATIO: 0}, "--kvbm-offload-ratio", "above 0"),
    ({RATIO: 1.01}, "--kvbm-offload-ratio", "above 1"),
    ({RATIO: "half"}, "--kvbm-offload-ratio", "number"),
    ({TIERS: ALL, DISK: 10}, "--kvbm-nvme-path", "needs --kvbm-nvme-path"),
    ({TIERS: ALL, PATH: "/data/kv"}, "--kvbm-nvme-gb", "needs --kvbm-nvme-gb"),
    ({**NVME, PATH: ""}, "--kvbm-nvme-path", "name a directory"),
    ({**NVME, PATH: "  "}, "--kvbm-nvme-path", "name a directory"),
    ({**NVME, DISK: 0}, "--kvbm-nvme-gb", "above 0"),
    ({**NVME, DISK: "1e300"}, "--kvbm-nvme-gb", "finite"),
    ({PATH: "/data/kv"}, "--kvbm-nvme-path", "add nvme_ssd there, or drop the flag"),
    ({DISK: 10}, "--kvbm-nvme-gb", "add nvme_ssd there, or drop the flag"),
    ({"kvbm_host_dram": 4}, "kvbm_host_dram", "kvbm_host_dram_gb"),
]


@pytest.mark.parametrize(("settings", "flag", "remedy"), BAD, ids=[repr(settings) for settings, _, _ in BAD])
def test_a_mistake_is_one_line_that_names_the_flag_and_the_remedy(
    settings: dict[str, Any], flag: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(settings)
    line = str(caught.value)
    assert "\n" not in line
    assert flag in line
    assert remedy in line


def test_a_config_error_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)


def test_nothing_set_means_four_gigabytes_of_host_memory() -> None:
    config = parse_config({})
    assert config == KvbmConfig(storage_tiers=("hbm", "host_dram"), host_dram_bytes=4 * GIGABYTE)
    assert config.has_tiers


def test_hbm_alone_keeps_nothing_below() -> None:
    config = parse_config({TIERS: "hbm"})
    assert config == KvbmConfig(storage_tiers=("hbm",))
    assert not config.has_tiers


@pytest.mark.parametrize("tiers", [ALL, " hbm , host_dram,nvme_ssd ", ["hbm", "host_dram", "nvme_ssd"]])
def test_every_setting_at_once(tiers: object) -> None:
    config = parse_config({TIERS: tiers, DRAM: "0.5", RATIO: "0.25", PATH: "/data/kv", DISK: 1.5})
    assert config == KvbmConfig(
        storage_tiers=("hbm", "host_dram", "nvme_ssd"),
        host_dram_bytes=GIGABYTE // 2,
        offload_ratio=0.25,
        nvme_path=Path("/data/kv"),
        nvme_bytes=3 * GIGABYTE // 2,
    )
    assert config.has_tiers


def test_other_peoples_settings_and_absent_ones_are_left_alone() -> None:
    foreign = {"lmcache_path": "", "tiers": "none", "role": 3, "kvbm_nvme_path": None, "kvbm_storage_tiers": None}
    assert parse_config(foreign) == parse_config({})


def test_the_record_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        parse_config({}).offload_ratio = 0.5  # type: ignore[misc]


def test_every_setting_has_its_help() -> None:
    assert set(SETTINGS) == {TIERS, DRAM, RATIO, PATH, DISK}
    assert all(text.endswith(".") for text in SETTINGS.values())
