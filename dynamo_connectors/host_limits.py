"""Asks the host whether the configured tiers can exist, before an engine spends a minute loading a model."""

from __future__ import annotations

from pathlib import Path

from dynamo_connectors.config import GIGABYTE, KvbmConfig
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.host_room import memory_bytes, refuse_unusable, slab_room_bytes
from dynamo_connectors.peer_config import PeerConfig
from dynamo_connectors.transport.agent import require_nixl
from dynamo_connectors.transport.channel import require_curve

_LEAST_SECRET_BYTES = 16


def check_host(config: KvbmConfig) -> None:
    """Raises `ConfigError` with one line when this machine cannot hold what `config` asks for."""
    memory = memory_bytes()
    if config.host_dram_bytes > memory:
        raise ConfigError(
            f"--kvbm-host-dram-gb {config.host_dram_bytes / GIGABYTE:g} is more than this host's "
            f"{memory / GIGABYTE:.1f} GB of memory; lower it"
        )
    if config.nvme_path is not None:
        _check_directory(config.nvme_path, config.nvme_bytes)
    if config.peer.role:
        read_secret(config.peer)
        require_nixl()
        require_curve()


def read_secret(peer: PeerConfig) -> bytes:
    """What the fleet shares. Raises `ConfigError`. Without a file only this host is spoken to."""
    if peer.secret_file is None:
        return b"this host alone"
    try:
        secret = peer.secret_file.read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"--kvbm-peer-secret-file {peer.secret_file} cannot be read ({error.strerror}); name a file with the "
            "fleet's secret"
        ) from None
    if len(secret) < _LEAST_SECRET_BYTES:
        raise ConfigError(
            f"--kvbm-peer-secret-file {peer.secret_file} holds less than {_LEAST_SECRET_BYTES} bytes; put a random "
            "secret in, the same for every engine"
        )
    return secret


def _check_directory(directory: Path, wanted_bytes: int) -> None:
    refuse_unusable(directory)
    room = slab_room_bytes(directory)
    if wanted_bytes > room:
        raise ConfigError(
            f"--kvbm-nvme-gb {wanted_bytes / GIGABYTE:g} is more than the {room / GIGABYTE:.1f} GB free in {directory}"
            "; lower it or free space there"
        )
