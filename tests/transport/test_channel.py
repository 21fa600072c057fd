"""A ZeroMQ that was built without libsodium encrypts nothing: it is said at start, not when the first peer is met."""

from __future__ import annotations

import pytest
import zmq

from dynamo_connectors.config import KvbmConfig
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.host_limits import check_host
from dynamo_connectors.peer_config import PeerConfig
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.transport.agent import Region
from dynamo_connectors.transport.peer_tier import PeerSettings, PeerTier


@pytest.fixture(autouse=True)
def without_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    has = zmq.has
    monkeypatch.setattr(zmq, "has", lambda what: what != "curve" and has(what))


@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
def test_every_role_is_refused_at_start_with_one_line(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_connectors.host_limits.require_nixl", lambda: "")
    with pytest.raises(ConfigError, match=r"--kvbm-role needs ZeroMQ with CURVE.*pip install") as raised:
        check_host(KvbmConfig(peer=PeerConfig(role=role)))
    assert "\n" not in str(raised.value)
    check_host(KvbmConfig())


def test_a_reader_does_not_begin_what_its_thread_could_not_do() -> None:
    dram = DramStore(1, 4096)
    region = Region(dram.rows.ctypes.data, dram.rows.nbytes)
    with pytest.raises(ConfigError, match="CURVE"):
        PeerTier(PeerSettings(0, b"n", 4096, b"s"), [region])
    dram.close()
