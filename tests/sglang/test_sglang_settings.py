"""What a user may write, and the one line for what they may not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_connectors.errors import ConfigError
from dynamo_connectors.sglang.settings import (
    WORKERS_KEY,
    Launch,
    asks_for_us,
    parse_storage_settings,
    read_extra_config,
    translate,
    worker_storage,
)


def launch(backend: str | None = "dynamo", extra: str | None = None, is_used: bool = True, **flags: object) -> Launch:
    return Launch(backend, extra, flags, is_used, workers=2)


def test_a_launch_without_us_is_left_alone() -> None:
    assert translate(launch(None, "not even json")) is None
    assert translate(launch("mooncake", '{"kvbm_future": 1}')) is None


def test_flags_become_the_dynamic_backend() -> None:
    translated = translate(launch(extra='{"prefetch_threshold": 64}', kvbm_nvme_path="/kv", kvbm_nvme_gb="2"))
    assert translated is not None
    extra = json.loads(translated.extra_config)
    assert extra["backend_name"] == "dynamo"
    assert extra["interface_v1"] == 1
    assert extra["prefetch_threshold"] == 64
    assert translated.config.nvme_bytes == 2 * 10**9
    assert translated.config.host_dram_bytes == 0
    assert (share := worker_storage(extra, ranks=7)).nvme_path == Path("/kv")
    assert share.nvme_bytes == 10**9


def test_the_size_has_a_default_and_the_extra_config_may_hold_everything() -> None:
    translated = translate(launch(extra='{"kvbm_nvme_path": "/kv"}'))
    assert translated is not None
    assert translated.config.nvme_bytes == 10 * 10**9


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (launch(), "needs --kvbm-nvme-path"),
        (launch(is_used=False, kvbm_nvme_path="/kv"), "--enable-hierarchical-cache"),
        (launch(None, kvbm_nvme_path="/kv"), "--kvbm-nvme-path needs --hicache-storage-backend dynamo"),
        (launch("file", kvbm_nvme_gb="1"), "--kvbm-nvme-gb needs --hicache-storage-backend dynamo"),
        (launch(kvbm_nvme_path=" "), "--kvbm-nvme-path is empty"),
        (launch(extra='{"kvbm_host_dram_gb": 4}', kvbm_nvme_path="/kv"), "--hicache-ratio or --hicache-size"),
        (launch(extra='{"kvbm_nvme_pth": "/kv"}'), "kvbm_nvme_pth"),
        (launch(extra='{"kvbm_nvme_path": "/a"}', kvbm_nvme_path="/b"), "give it once"),
        (launch(extra="{", kvbm_nvme_path="/kv"), "cannot be parsed"),
        (launch(extra="[1]", kvbm_nvme_path="/kv"), "must hold settings by name"),
        (launch(extra="@/no/such/file.json", kvbm_nvme_path="/kv"), "cannot be read"),
        (launch(extra="@/etc/hostname", kvbm_nvme_path="/kv"), "must end in"),
    ],
)
def test_a_mistake_is_one_line(wrong: Launch, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        translate(wrong)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.sampled_from(["0", "-1", "nan", "inf", "-inf", "ten", "", "1e999", "0x10"]))
def test_a_size_that_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match="--kvbm-nvme-gb"):
        translate(launch(kvbm_nvme_path="/kv", kvbm_nvme_gb=size))


@given(st.dictionaries(st.text(max_size=12), st.none() | st.booleans() | st.text() | st.floats() | st.integers()))
def test_settings_of_any_kind_are_parsed_or_refused_in_one_line(settings: dict[str, object]) -> None:
    # What is not asked for is tested elsewhere: whatever is given, the answer is a config or one line.
    with pytest.raises(ConfigError) as caught:
        parse_storage_settings({"kvbm_nvme_gb": 1} | settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"kvbm_nvme_gb": 3}'),
        ("a.yaml", "kvbm_nvme_gb: 3"),
        ("a.yml", "kvbm_nvme_gb: 3"),
        ("a.toml", "kvbm_nvme_gb = 3"),
    ],
)
def test_the_extra_config_may_be_a_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_extra_config(f"@{tmp_path / name}") == {"kvbm_nvme_gb": 3}


def test_a_worker_needs_the_zero_copy_interface_and_a_sane_count() -> None:
    with pytest.raises(ConfigError, match="interface_v1"):
        worker_storage({"kvbm_nvme_path": "/kv"}, 1)
    with pytest.raises(ConfigError, match=WORKERS_KEY):
        worker_storage({"kvbm_nvme_path": "/kv", "interface_v1": 1, WORKERS_KEY: 0}, 1)


@pytest.mark.parametrize(
    ("arguments", "asks"),
    [
        (["--hicache-storage-backend", "dynamo"], True),
        (["--hicache-storage-backend=dynamo"], True),
        (["--hicache-storage-back", "dynamo"], True),
        (["--hicache-storage-backend", "file"], False),
        (["--served-model-name", "dynamo"], False),
        (["--hicache-storage-backend"], False),
        (["--config", "/no/such/file"], False),
        ([], False),
    ],
)
def test_asking_for_us_is_seen_on_the_command_line(arguments: list[str], asks: bool) -> None:
    assert asks_for_us(arguments) is asks


@pytest.mark.parametrize(("text", "asks"), [("hicache_storage_backend: dynamo", True), ("- 1", False), ("{", False)])
def test_asking_for_us_is_seen_in_the_config_file(tmp_path: Path, text: str, asks: bool) -> None:
    (tmp_path / "sglang.yaml").write_text(text)
    assert asks_for_us(["--config", str(tmp_path / "sglang.yaml")]) is asks


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_compression_is_refused_in_one_line(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"--kvbm-compression {kind} is not there under SGLang yet") as caught:
        translate(launch(kvbm_nvme_path="/kv", kvbm_compression=kind))
    assert "\n" not in str(caught.value)
    assert translate(launch(kvbm_nvme_path="/kv", kvbm_compression="off")) is not None
