"""What users may write, and the one line they get when they may not."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from dynamo_connectors.config import GIGABYTE, SETTINGS, KvbmConfig, parse_config
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.peer_config import PEER_SETTINGS

TIERS, DRAM, RATIO = "kvbm_storage_tiers", "kvbm_host_dram_gb", "kvbm_offload_ratio"
PATH, DISK = "kvbm_nvme_path", "kvbm_nvme_gb"
URL, ENDPOINT, SPACE = "kvbm_object_url", "kvbm_object_endpoint_url", "kvbm_object_gb"
DEADLINE, POLICY, GATE = "kvbm_object_deadline_ms", "kvbm_eviction_policy", "kvbm_load_gate"
COMPRESSION = "kvbm_compression"
TOUCHES = ("kvbm_dram_min_touches", "kvbm_nvme_min_touches", "kvbm_object_min_touches")
ALL = "hbm,host_dram,nvme_ssd"
NVME = {TIERS: ALL, PATH: "/data/kv", DISK: 10}
OBJECT = {TIERS: "hbm,host_dram,object_store", URL: "s3://bucket/kv", SPACE: 10}

#: Settings, the flag that the line must name, words of its remedy.
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({TIERS: "hbm,tape"}, "--kvbm-storage-tiers", "known: hbm, host_dram, nvme_ssd, object_store"),
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
    ({COMPRESSION: "fp4"}, "--kvbm-compression", "write off or fp8 or int8"),
    ({COMPRESSION: "on"}, "--kvbm-compression", "write off or fp8 or int8"),
    ({TIERS: "hbm", COMPRESSION: "fp8"}, "--kvbm-compression", "add host_dram there, or drop the flag"),
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
    ({TIERS: "hbm,object_store", URL: "s3://b", SPACE: 1}, "--kvbm-storage-tiers", "write hbm or hbm,host_dram"),
    ({TIERS: "hbm,host_dram,object_store,nvme_ssd"}, "--kvbm-storage-tiers", "write hbm or hbm,host_dram"),
    ({TIERS: "hbm,host_dram,object_store", SPACE: 1}, "--kvbm-object-url", "needs --kvbm-object-url"),
    ({TIERS: "hbm,host_dram,object_store", URL: "s3://b"}, "--kvbm-object-gb", "needs --kvbm-object-gb"),
    ({**OBJECT, URL: ""}, "--kvbm-object-url", "URL"),
    ({**OBJECT, URL: "bucket/kv"}, "--kvbm-object-url", "write s3://bucket/prefix"),
    ({**OBJECT, URL: "s3:///kv"}, "--kvbm-object-url", "write s3://bucket/prefix"),
    ({**OBJECT, URL: "s3://bucket/kv?x=1"}, "--kvbm-object-url", "write s3://bucket/prefix"),
    ({**OBJECT, URL: "s3://key:secret@bucket/kv"}, "--kvbm-object-url", "set AWS_ACCESS_KEY_ID"),
    ({**OBJECT, URL: "s3://buck et/kv"}, "--kvbm-object-url", "URL"),
    ({**OBJECT, URL: "s3://bucket/\nkv"}, "--kvbm-object-url", "URL"),
    ({**OBJECT, ENDPOINT: "minio:9000"}, "--kvbm-object-endpoint-url", "write http://host:port"),
    ({**OBJECT, ENDPOINT: "http://minio:nine"}, "--kvbm-object-endpoint-url", "URL"),
    ({**OBJECT, ENDPOINT: "http://key:secret@minio"}, "--kvbm-object-endpoint-url", "set AWS_ACCESS_KEY_ID"),
    ({**OBJECT, SPACE: 0}, "--kvbm-object-gb", "above 0"),
    ({**OBJECT, DEADLINE: 0}, "--kvbm-object-deadline-ms", "above 0"),
    ({**OBJECT, DEADLINE: 60_001}, "--kvbm-object-deadline-ms", "lower it"),
    ({**OBJECT, DEADLINE: "soon"}, "--kvbm-object-deadline-ms", "number"),
    ({URL: "s3://b"}, "--kvbm-object-url", "add object_store there, or drop the flag"),
    ({ENDPOINT: "http://b"}, "--kvbm-object-endpoint-url", "add object_store there, or drop the flag"),
    ({DEADLINE: 5}, "--kvbm-object-deadline-ms", "add object_store there, or drop the flag"),
    ({TIERS: "hbm", TOUCHES[0]: 2}, "--kvbm-dram-min-touches", "add host_dram there, or drop the flag"),
    ({TOUCHES[1]: 2}, "--kvbm-nvme-min-touches", "add nvme_ssd there, or drop the flag"),
    ({TOUCHES[2]: 2}, "--kvbm-object-min-touches", "add object_store there, or drop the flag"),
    ({TOUCHES[0]: 0}, "--kvbm-dram-min-touches", "above 0"),
    ({TOUCHES[0]: 1.5}, "--kvbm-dram-min-touches", "whole number"),
    ({TOUCHES[0]: 256}, "--kvbm-dram-min-touches", "from 1 to 255"),
    ({POLICY: "lfu"}, "--kvbm-eviction-policy", "write lru or arc"),
    ({GATE: "maybe"}, "--kvbm-load-gate", "write on or off"),
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
    config = parse_config({TIERS: tiers, DRAM: "0.5", RATIO: "0.25", PATH: "/data/kv", DISK: 1.5, POLICY: "arc"})
    assert config == KvbmConfig(
        storage_tiers=("hbm", "host_dram", "nvme_ssd"),
        host_dram_bytes=GIGABYTE // 2,
        offload_ratio=0.25,
        eviction_policy="arc",
        nvme_path=Path("/data/kv"),
        nvme_bytes=3 * GIGABYTE // 2,
    )
    assert config.has_tiers


def test_an_object_store_with_and_without_a_disk_above_it() -> None:
    settings = {ENDPOINT: "http://minio:9000/", DEADLINE: "250", TOUCHES[2]: "3", GATE: "off"}
    config = parse_config({**OBJECT, **settings})
    assert config == KvbmConfig(
        storage_tiers=("hbm", "host_dram", "object_store"),
        host_dram_bytes=4 * GIGABYTE,
        load_gate=False,
        object_url="s3://bucket/kv",
        object_endpoint_url="http://minio:9000",
        object_bytes=10 * GIGABYTE,
        object_min_touches=3,
        object_deadline_seconds=0.25,
    )
    assert parse_config({**NVME, **OBJECT, TIERS: f"{ALL},object_store"}).nvme_bytes == 10 * GIGABYTE


def test_each_tier_below_says_how_often_a_block_must_have_been_used() -> None:
    settings = {**NVME, **OBJECT, TIERS: f"{ALL},object_store", TOUCHES[0]: 2, TOUCHES[1]: 3}
    assert parse_config(settings).min_touches == {"host_dram": 2, "nvme_ssd": 3, "object_store": 2}
    assert parse_config({}).min_touches == {"host_dram": 1}
    assert parse_config({TIERS: "hbm"}).min_touches == {}


@pytest.mark.parametrize(("word", "is_on"), [("on", True), (True, True), ("off", False), (False, False)])
def test_the_gate_is_on_or_off_also_as_yaml_reads_it(word: object, is_on: bool) -> None:
    assert parse_config({GATE: word}).load_gate is is_on


def test_other_peoples_settings_and_absent_ones_are_left_alone() -> None:
    foreign = {"lmcache_path": "", "tiers": "none", "role": 3, "kvbm_nvme_path": None, "kvbm_storage_tiers": None}
    assert parse_config(foreign) == parse_config({})


def test_the_record_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        parse_config({}).offload_ratio = 0.5  # type: ignore[misc]


def test_every_setting_has_its_help() -> None:
    known = {TIERS, DRAM, RATIO, PATH, DISK, URL, ENDPOINT, SPACE, DEADLINE, POLICY, GATE, COMPRESSION, *TOUCHES}
    known |= set(PEER_SETTINGS)
    assert set(SETTINGS) == known
    assert all(text.endswith(".") for text in SETTINGS.values())


def test_a_home_directory_is_found_without_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/kv")
    assert parse_config({TIERS: "hbm,host_dram,nvme_ssd", PATH: "~/slabs", DISK: 1}).nvme_path == Path("/srv/kv/slabs")
    with pytest.raises(ConfigError, match="--kvbm-nvme-path ~nobody-here/slabs"):
        parse_config({TIERS: "hbm,host_dram,nvme_ssd", PATH: "~nobody-here/slabs", DISK: 1})


def test_compression_is_off_unless_asked_for() -> None:
    assert parse_config({}).compression is None
    assert parse_config({COMPRESSION: False}).compression is None  # a bare `off` in YAML
    assert parse_config({COMPRESSION: "off"}).compression is None
    assert parse_config({COMPRESSION: " int8 "}).compression == "int8"
