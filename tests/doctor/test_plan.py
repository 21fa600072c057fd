"""The flags of a launch line: what the doctor makes of them, and that it refuses what the engine refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_connectors.config import parse_config
from dynamo_connectors.doctor.finding import Level
from dynamo_connectors.doctor.flags import examine_peers, judge_spelling
from dynamo_connectors.doctor.plan import Plan, plan_of
from dynamo_connectors.errors import ConfigError

DISK = {"kvbm_nvme_path": "/kv", "kvbm_nvme_gb": "5"}
LISTED = {"kvbm_storage_tiers": "hbm,host_dram,nvme_ssd", **DISK, "kvbm_compression": "fp8"}


def test_a_whole_launch_line_is_read_as_the_engine_reads_it() -> None:
    plan = plan_of(LISTED)
    assert (plan.host_dram_gb, plan.nvme_path, plan.nvme_gb) == (4.0, Path("/kv"), 5.0)
    assert judge_spelling(plan, ["vllm"]) == []


def test_no_flags_no_wishes() -> None:
    assert plan_of({}) == Plan()


def test_one_place_alone_can_be_asked_about() -> None:
    plan = plan_of({"kvbm_object_url": "s3://b/kv"})
    assert (plan.object_url, plan.host_dram_gb, plan.nvme_path) == ("s3://b/kv", None, None)
    (finding,) = judge_spelling(plan, ["vllm"])
    assert finding.level is Level.WARN
    assert finding.remedy.endswith("--kvbm-storage-tiers hbm,host_dram,object_store")


def test_what_one_engine_here_takes_is_no_warning() -> None:
    plan = plan_of(DISK)
    assert [finding.name for finding in judge_spelling(plan, ["vllm"])] == ["vllm flags"]
    assert judge_spelling(plan, ["vllm", "sglang"]) == []
    assert judge_spelling(plan, []) == []


def test_a_secret_without_a_role_is_a_launch_line_of_sglang(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of sixteen bytes or more")
    plan = plan_of({"kvbm_peer_secret_file": str(tmp_path / "secret")})
    assert judge_spelling(plan, ["sglang"]) == []
    assert [finding.level for finding in judge_spelling(plan, ["vllm"])] == [Level.WARN]


@pytest.mark.parametrize(
    "wrong",
    [
        {"kvbm_storage_tiers": "hbm,nvme_ssd"},
        {"kvbm_compression": "fp9"},
        {"kvbm_host_dram_gb": "lots"},
        {"kvbm_role": "chef"},
        {"kvbm_storage_tiers": "hbm,host_dram", **DISK},
        {**LISTED, "kvbm_nvme_min_touches": "0"},
    ],
)
def test_a_wrong_value_is_told_in_the_engines_words(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as engine:
        parse_config(wrong)
    with pytest.raises(ConfigError) as doctor:
        plan_of(wrong)
    assert str(doctor.value) == str(engine.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"kvbm_object_url": "http://b/kv"}, "s3://bucket/prefix"),
        ({"kvbm_object_endpoint_url": "http://x:1"}, "needs --kvbm-object-url"),
        ({"kvbm_object_url": "s3://b/kv", "kvbm_object_endpoint_url": "ftp://x"}, "http://host:port"),
        ({"kvbm_nvme_gb": "5"}, "needs --kvbm-nvme-path"),
        ({"kvbm_host_dram_gb": "0.0000001"}, "less than a megabyte"),
    ],
)
def test_a_wrong_value_beside_no_list_of_tiers_is_told_too(wrong: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_of(wrong)


@pytest.mark.parametrize("role", [{"kvbm_role": "prefill"}, {}])
def test_a_secret_that_no_engine_would_take_is_refused(role: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "short").write_text("short")
    for name, words in (("none", "cannot be read"), ("short", "less than 16 bytes")):
        with pytest.raises(ConfigError, match=words):
            plan_of({**role, "kvbm_peer_secret_file": str(tmp_path / name)})


def test_a_role_needs_what_speaks_to_peers() -> None:
    (local,) = examine_peers(plan_of({"kvbm_role": "prefill"}).peer)
    assert local.level is Level.OK
    assert examine_peers(Plan().peer) == []
