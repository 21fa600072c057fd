"""Every spelling of the connector ends in the same `KVTransferConfig`; nonsense ends in one line and exit code 2."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

DYNAMO = ["--kv-connector", "dynamo"]
DISK = [*DYNAMO, "--kvbm-storage-tiers", "hbm,host_dram,nvme_ssd", "--kvbm-nvme-path"]
NATIVE = {"kv_connector": "dynamo", "kv_role": "kv_both"}


@pytest.fixture(scope="module")
def parse() -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def run(arguments: Sequence[str]) -> Any:
        parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
        return AsyncEngineArgs.from_cli_args(parser.parse_args(arguments)).kv_transfer_config

    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kv-connector", "dynamo", "--kvbm-host-dram-gb", "0.5"],
        ["--kv-connector=dynamo", "--kvbm_host_dram_gb=0.5"],
        ["--kvbm-host-dram-gb", "0.5", "--kv-transfer-config", json.dumps(NATIVE)],
        ["--kv-connector", "dynamo", "--kvbm-host-dram-gb", "0.5", "--kv-transfer-config", json.dumps(NATIVE)],
        ["--kv-transfer-config", json.dumps({**NATIVE, "kv_connector_extra_config": {"kvbm_host_dram_gb": 0.5}})],
        [
            "--kv-transfer-config.kv_connector", "dynamo", "--kv-transfer-config.kv_role", "kv_both",
            "--kvbm-host-dram-gb", "0.5",
        ],
    ],
)  # fmt: skip
def test_every_spelling_gives_the_same_configuration(parse: Any, arguments: list[str]) -> None:
    config = parse(arguments)
    assert (config.kv_connector, config.kv_role) == ("dynamo", "kv_both")
    assert float(config.kv_connector_extra_config["kvbm_host_dram_gb"]) == 0.5
    assert config.kv_load_failure_policy == "recompute"


def test_engine_args_in_python_may_hold_plain_fields(parse: Any, tiny_model: Path) -> None:
    """vLLM makes a `KVTransferConfig` of them only later, where our policy for lost blocks would come too late."""
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(model=str(tiny_model), kv_transfer_config={**NATIVE, "engine_id": "e7"})
    config = args.create_engine_config().kv_transfer_config
    assert (config.engine_id, config.kv_load_failure_policy) == ("e7", "recompute")


def test_yaml_gives_the_same_configuration(parse: Any, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("kv-connector: dynamo\nkvbm-host-dram-gb: 0.5\nkvbm-storage-tiers: hbm,host_dram\n")
    config = parse(["--config", str(path)])
    assert config.kv_connector == "dynamo"
    assert config.kv_connector_extra_config == {"kvbm_host_dram_gb": "0.5", "kvbm_storage_tiers": "hbm,host_dram"}


def test_other_settings_of_an_explicit_config_survive(parse: Any) -> None:
    explicit = {"kv_role": "kv_consumer", "engine_id": "e7", "kv_connector_extra_config": {"theirs": 1}}
    config = parse(
        ["--kv-connector", "dynamo", "--kvbm-offload-ratio", "0.5", "--kv-transfer-config", json.dumps(explicit)]
    )
    assert (config.kv_role, config.engine_id) == ("kv_consumer", "e7")
    assert config.kv_connector_extra_config == {"theirs": 1, "kvbm_offload_ratio": "0.5"}


def beside_another(extra: dict[str, Any]) -> list[str]:
    """dynamo as one of several connectors, in vLLM's own spelling."""
    children = [{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}]
    children.append({**NATIVE, "kv_connector_extra_config": extra})
    config = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}
    return ["--kv-transfer-config", json.dumps({**config, "kv_connector_extra_config": {"connectors": children}})]


def test_dynamo_beside_another_connector_recomputes_lost_blocks_too(parse: Any) -> None:
    config = parse(beside_another({"kvbm_host_dram_gb": 0.5}))
    assert (config.kv_connector, config.kv_load_failure_policy) == ("MultiConnector", "recompute")


def test_statistics_of_a_multi_connector_are_found_by_class_name() -> None:
    """vLLM's MultiConnector names statistics by class and looks the class up by that name; a miss ended the server."""
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

    from dynamo_connectors.vllm.connector import DynamoConnector

    wire = {DynamoConnector.__name__: {"counts": {"onboarded_bytes|": 7}}}
    assert MultiConnector.build_kv_connector_stats(wire).reduce() == {"DynamoConnector": {"onboarded_bytes|": 7}}


def test_vllm_without_our_flags_is_untouched(parse: Any) -> None:
    assert parse([]) is None
    other = parse(["--kv-transfer-config", '{"kv_connector":"ExampleConnector","kv_role":"kv_both"}'])
    assert (other.kv_connector, other.kv_load_failure_policy) == ("ExampleConnector", "fail")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kvbm-host-dram-gb", "1"], ["--kvbm-host-dram-gb", "needs --kv-connector dynamo"]),
        ([*DYNAMO, "--kvbm-storage-tiers", "hbm,ram"], ["--kvbm-storage-tiers", "'ram'", "host_dram"]),
        (["--kv-connector", "dynamo", "--kvbm-storage-tiers", "hbm,nvme_ssd"], ["--kvbm-storage-tiers"]),
        (["--kv-connector", "dynamo", "--kvbm-host-dram-gb", "0"], ["--kvbm-host-dram-gb", "above 0"]),
        (["--kv-connector", "dynamo", "--kvbm-host-dram-gb", "lots"], ["--kvbm-host-dram-gb", "not a number"]),
        (["--kv-connector", "dynamo", "--kvbm-host-dram-gb", "1e9"], ["--kvbm-host-dram-gb", "memory"]),
        (["--kv-connector", "dynamo", "--kvbm-offload-ratio", "1.5"], ["--kvbm-offload-ratio"]),
        (["--kv-connector", "dynamo", "--kvbm-nvme-path", "/x"], ["--kvbm-nvme-path", "nvme_ssd"]),
        (
            [*DISK, "/proc/nothing", "--kvbm-nvme-gb", "1"],
            ["--kvbm-nvme-path /proc/nothing does not exist", "mkdir -p /proc/nothing"],
        ),
        ([*DISK, "/etc/hostname", "--kvbm-nvme-gb", "1"], ["/etc/hostname cannot be used (Not a directory)"]),
        ([*DISK, "/proc", "--kvbm-nvme-gb", "1"], ["--kvbm-nvme-path /proc cannot be used", "may write to"]),
        ([*DISK, "/var", "--kvbm-nvme-gb", "1e7"], ["--kvbm-nvme-gb 1e+07 is more than", "free in /var"]),
        ([*DYNAMO, "--kvbm-storage-tiers", ""], ["--kvbm-storage-tiers", "unknown tier ''", "host_dram"]),
        ([*DYNAMO, "--pipeline-parallel-size", "2"], ["--pipeline-parallel-size above 1"]),
        ([*DYNAMO, "--kvbm-host-dram-gb", "1e-9"], ["--kvbm-host-dram-gb", "less than a megabyte"]),
        (
            [*DYNAMO, "--kv-transfer-config", '{"kv_connector":"NixlConnector","kv_role":"kv_both"}'],
            ["--kv-connector dynamo", "NixlConnector"],
        ),
        (
            ["--kvbm-host-dram-gb", "2", "--kv-transfer-config",
             json.dumps({**NATIVE, "kv_connector_extra_config": {"kvbm_host_dram_gb": 1}})],
            ["--kvbm-host-dram-gb 2", "says 1"],
        ),
        (
            ["--kv-transfer-config", json.dumps({**NATIVE, "kv_connector_extra_config": {"kvbm_dram": 1}})],
            ["kvbm_dram", "kvbm_host_dram_gb"],
        ),
        (beside_another({"kvbm_host_dram_gb": 0}), ["--kvbm-host-dram-gb", "above 0"]),
    ],
)  # fmt: skip
def test_nonsense_is_one_line(
    parse: Any, capfd: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("vllm: error: ")
    for word in words:
        assert word in lines[0]


def test_python_api_gets_the_same_checks() -> None:
    from vllm import EngineArgs
    from vllm.config import KVTransferConfig

    from dynamo_connectors.errors import ConfigError

    bad = KVTransferConfig(**NATIVE, kv_connector_extra_config={"kvbm_host_dram_gb": -1})
    with pytest.raises(ConfigError, match="--kvbm-host-dram-gb -1 must be a finite number above 0"):
        EngineArgs(model="anything", kv_transfer_config=bad).create_engine_config()


def test_an_argument_parser_that_already_has_the_flag_is_left_alone() -> None:
    from dynamo_connectors.vllm.launch_flags import add_flags

    parser = argparse.ArgumentParser()
    parser.add_argument("--kv-connector")
    add_flags(parser)
    assert "--kvbm-host-dram-gb" not in parser.format_help()


def test_a_vllm_that_lost_a_method_is_reported_not_broken() -> None:
    from dynamo_connectors.errors import PluginError
    from dynamo_connectors.vllm.launch_flags import install

    class OtherEngineArgs:
        @staticmethod
        def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            return parser

    with pytest.raises(PluginError, match="--kv-transfer-config"):
        install(OtherEngineArgs)


def test_an_older_vllm_is_refused_at_start_and_not_at_its_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1 import base

    from dynamo_connectors.errors import PluginError
    from dynamo_connectors.vllm.compat import require_supported_engine

    require_supported_engine()
    monkeypatch.setattr(base, "KVConnectorBase_V1", type("OlderConnector", (), {}))
    with pytest.raises(PluginError, match=r"0\.24 or newer"):
        require_supported_engine()
