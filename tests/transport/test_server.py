"""What the serving side says when it cannot serve."""

from __future__ import annotations

import socket

import pytest

from dynamo_connectors.errors import ConfigError
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.transport.server import PeerServer, ServerSettings


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_that_is_taken_is_told_in_one_line(host: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        dram = DramStore(1, 4096)
        with pytest.raises(ConfigError, match=f"{host}:{port}.*left-over process.*--kvbm-peer-port"):
            PeerServer(ServerSettings(host, port, b"n", b"s"), dram)
        dram.close()


def test_a_host_that_is_not_this_one_is_told_in_one_line() -> None:
    dram = DramStore(1, 4096)
    with pytest.raises(ConfigError, match=r"; choose another .*--kvbm-peer-host"):
        PeerServer(ServerSettings("192.0.2.1", 5700, b"n", b"s"), dram)
    dram.close()
