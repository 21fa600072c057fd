"""The part that an engine plays in a fleet: what users may write, and the one line they get when they may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynamo_connectors.config import parse_config
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.host_limits import check_host, read_secret
from dynamo_connectors.peer_config import PeerConfig

ROLE, HOST, PORT = "kvbm_role", "kvbm_peer_host", "kvbm_peer_port"
SECRET, DEADLINE, HBM = "kvbm_peer_secret_file", "kvbm_peer_deadline_ms", "kvbm_peer_hbm_gb"

BAD: list[tuple[dict[str, Any], str, str]] = [
    ({ROLE: "prefil"}, "--kvbm-role", "write prefill, decode or both"),
    ({PORT: 5700}, "--kvbm-peer-port", "add it, or drop the flag"),
    ({ROLE: "both", "kvbm_storage_tiers": "hbm"}, "--kvbm-role", "add it to --kvbm-storage-tiers"),
    ({ROLE: "both", HOST: "10.0.0.1"}, "--kvbm-peer-host", "--kvbm-peer-secret-file"),
    ({ROLE: "both", HOST: "0.0.0.0", SECRET: "x"}, "--kvbm-peer-host", "other engines reach"),
    ({ROLE: "both", HOST: "prefill-1"}, "--kvbm-peer-host", "--kvbm-peer-secret-file"),
    ({ROLE: "prefill", "kvbm_dram_min_touches": 2}, "--kvbm-role", "drop these"),
    ({ROLE: "both", "kvbm_offload_ratio": 0.5}, "--kvbm-role", "drop these"),
    ({ROLE: "both", PORT: 0}, "--kvbm-peer-port", "whole number from 1 to 65535"),
    ({ROLE: "both", PORT: 70000}, "--kvbm-peer-port", "whole number from 1 to 65535"),
    ({ROLE: "both", PORT: 1.5}, "--kvbm-peer-port", "whole number from 1 to 65535"),
    ({ROLE: "both", DEADLINE: "soon"}, "--kvbm-peer-deadline-ms", "number from 1 to 600000"),
    ({ROLE: "both", DEADLINE: "nan"}, "--kvbm-peer-deadline-ms", "number from 1 to 600000"),
    ({ROLE: "both", HBM: "much"}, "--kvbm-peer-hbm-gb", "0 for none"),
    ({ROLE: "both", HBM: -1}, "--kvbm-peer-hbm-gb", "0 for none"),
    ({ROLE: "both", HBM: "nan"}, "--kvbm-peer-hbm-gb", "0 for none"),
    ({ROLE: "both", HBM: 1, "kvbm_compression": "fp8"}, "--kvbm-peer-hbm-gb", "drop one of the two"),
]


@pytest.mark.parametrize(("settings", "flag", "remedy"), BAD)
def test_a_mistake_is_one_line_that_names_the_flag_and_the_remedy(
    settings: dict[str, Any], flag: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as wrong:
        parse_config(settings)
    line = str(wrong.value)
    assert flag in line
    assert remedy in line
    assert "\n" not in line


def test_every_setting_at_once() -> None:
    settings = {ROLE: "decode", HOST: "::1", PORT: "6000", SECRET: "/run/secret", DEADLINE: "2500"}
    peer = parse_config(settings).peer
    assert peer == PeerConfig("decode", "::1", 6000, Path("/run/secret"), 2.5)
    assert (peer.reads, peer.serves) == (True, False)
    both = parse_config({ROLE: "both"}).peer
    assert (both.reads, both.serves) == (True, True)
    assert not parse_config({}).peer.role
    assert parse_config({ROLE: "decode", "kvbm_dram_min_touches": 2, "kvbm_offload_ratio": 0.5}).peer.reads


def test_the_secret_is_read_and_must_be_one(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    config = parse_config({ROLE: "both", HOST: "10.0.0.1", SECRET: str(file)})
    with pytest.raises(ConfigError, match="cannot be read"):
        read_secret(config.peer)
    file.write_bytes(b"short\n")
    with pytest.raises(ConfigError, match="random secret"):
        read_secret(config.peer)
    file.write_bytes(b"0123456789abcdef\n")
    assert read_secret(config.peer) == b"0123456789abcdef"


def test_a_role_without_nixl_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_connectors.transport.agent.installed_build", lambda: None)
    with pytest.raises(ConfigError, match=r"pip install 'dynamo-connectors\[nixl\]'"):
        check_host(parse_config({ROLE: "prefill", "kvbm_host_dram_gb": 0.01}))


@pytest.mark.parametrize(
    ("settings", "on_gpu", "on_cpu"),
    [
        ({ROLE: "decode"}, 10**9, 0),
        ({ROLE: "both"}, 5 * 10**8, 0),
        ({ROLE: "both", HBM: 3}, 15 * 10**8, 15 * 10**8),
        ({ROLE: "prefill", HBM: 0}, 0, 0),
        ({ROLE: "prefill", "kvbm_compression": "fp8"}, 0, 0),
    ],
)
def test_rows_in_hbm_are_usual_on_gpus_and_shared_by_what_an_engine_does(
    settings: dict[str, Any], on_gpu: int, on_cpu: int
) -> None:
    peer = parse_config(settings).peer
    assert (peer.hbm_bytes_on("cuda"), peer.hbm_bytes_on("cpu")) == (on_gpu, on_cpu)
