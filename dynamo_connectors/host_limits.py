"""Asks the host whether the configured tiers can exist, before an engine spends a minute loading a model."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from dynamo_connectors.config import GIGABYTE, KvbmConfig
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.peer_config import PeerConfig
from dynamo_connectors.transport.agent import require_nixl
from dynamo_connectors.transport.channel import require_curve

_LEAST_SECRET_BYTES = 16


def physical_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_host(config: KvbmConfig) -> None:
    """Raises `ConfigError` with one line when this machine cannot hold what `config` asks for."""
    memory = physical_memory_bytes()
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
    is_new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            free = shutil.disk_usage(directory).free
    except OSError as error:
        raise ConfigError(
            f"--kvbm-nvme-path {directory} cannot be used ({error.strerror}); name a directory this user may write to"
        ) from error
    # Slabs of engines that have died are taken over, so their space counts as free.
    reusable = sum(_disk_bytes(path) for path in directory.glob("kvbm-*.slab"))
    if wanted_bytes > free + reusable:
        if is_new:
            directory.rmdir()
        raise ConfigError(
            f"--kvbm-nvme-gb {wanted_bytes / GIGABYTE:g} is more than the {free / GIGABYTE:.1f} GB free in {directory}"
        )


def _disk_bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:  # its engine has just closed it
        return 0
