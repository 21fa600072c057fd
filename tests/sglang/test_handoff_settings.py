"""What a launch asks of the hand-off, and which requests are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_connectors.errors import ConfigError
from dynamo_connectors.sglang.handoff_settings import HandoffConfig, refuse_request, told_handoff, translate_handoff


def launch(**changes: Any) -> SimpleNamespace:
    facts = {"disaggregation_transfer_backend": "dynamo", "disaggregation_mode": "prefill", "device": "cpu"}
    return SimpleNamespace(**facts | changes)


def test_schedulers_hear_what_the_launcher_was_told(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret of the fleet, long enough")
    variables: dict[str, str] = {}
    flags = {"kvbm_peer_secret_file": str(secret), "kvbm_peer_deadline_ms": "2500"}
    assert translate_handoff(launch(), flags, variables)
    assert told_handoff(variables) == HandoffConfig(secret, 2.5)
    assert told_handoff(variables).secret() == b"a secret of the fleet, long enough"
    variables["SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT"] = "30"
    with pytest.raises(ConfigError, match="RELEASE_TIMEOUT"):
        told_handoff(variables)


def test_without_flags_the_deadline_is_ten_seconds_and_this_host_is_alone() -> None:
    variables: dict[str, str] = {}
    assert translate_handoff(launch(), {}, variables)
    assert told_handoff(variables) == HandoffConfig(None, 10.0)
    assert told_handoff(variables).is_local


def test_other_launches_are_left_alone() -> None:
    variables: dict[str, str] = {}
    assert not translate_handoff(launch(disaggregation_transfer_backend="nixl"), {}, variables)
    assert not variables


@pytest.mark.parametrize(
    ("changes", "flags", "word"),
    [
        ({"disaggregation_transfer_backend": "nixl"}, {"kvbm_peer_deadline_ms": "5000"}, "needs"),
        ({"disaggregation_mode": "null"}, {}, "--disaggregation-mode"),
        ({"pp_size": 2}, {}, "--pp-size"),
        ({"dp_size": 2}, {}, "--dp-size"),
        ({"device": "cuda"}, {}, "CPU engine only"),
        ({"disaggregation_decode_enable_radix_cache": True}, {}, "--disaggregation-decode-enable-radix-cache"),
        ({"disaggregation_decode_allocation_policy": "prefill_complete"}, {}, "early"),
        ({}, {"kvbm_peer_deadline_ms": "soon"}, "soon"),
        ({}, {"kvbm_peer_deadline_ms": "10"}, "from 1000"),
        ({}, {"kvbm_peer_secret_file": "/nowhere"}, "cannot be read"),
    ],
)
def test_a_mistake_is_one_line(changes: dict[str, Any], flags: dict[str, str], word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        translate_handoff(launch(**changes), flags, {})
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "port", "room", "word"),
    [
        (None, 8998, 5, "bootstrap_host"),
        ("", 8998, 5, "bootstrap_host"),
        ("a", None, 5, "bootstrap_port"),
        ("a", 70000, 5, "bootstrap_port"),
        ("a", 8998, 0, "bootstrap_room"),
        ("a", 8998, -1, "bootstrap_room"),
        ("a", 8998, 1 << 63, "bootstrap_room"),
    ],
)
def test_requests_that_end_a_server_are_refused(host: object, port: object, room: object, word: str) -> None:
    refusal = refuse_request(host, port, room)
    assert refusal is not None
    assert word in refusal


def test_a_whole_request_is_not_refused() -> None:
    assert refuse_request("10.0.0.1", 8998, (1 << 63) - 1) is None
