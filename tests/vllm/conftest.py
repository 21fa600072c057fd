"""One real vLLM for the whole session of tests, and what is needed to talk to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.client import VllmClient
from tests.vllm.faulty.sitecustomize import VARIABLE
from tools.server_process import ServerProcess, free_port
from tools.tiny_model import make_model
from tools.vllm_server import VllmOptions, vllm_server


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def events_port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def nvme_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nvme")


@pytest.fixture(scope="session")
def fault_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `tests/vllm/faulty`."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def engine(
    tiny_model: Path, logs: Path, nvme_directory: Path, events_port: int, fault_folder: Path
) -> Iterator[ServerProcess]:
    """vLLM with `--kv-connector dynamo`: 160 HBM blocks, room for 305 in DRAM and for 735 on disk."""
    tiers = ["--kv-connector", "dynamo", "--kvbm-storage-tiers", "hbm,host_dram,nvme_ssd"]
    sizes = ["--kvbm-host-dram-gb", "0.02", "--kvbm-nvme-path", str(nvme_directory), "--kvbm-nvme-gb", "0.05"]
    # Every block goes to the disk, and every hit is loaded: the tests count them.
    rules = ["--kvbm-nvme-min-touches", "1", "--kvbm-load-gate", "off"]
    options = VllmOptions(events_port=events_port, extra=[*tiers, *sizes, *rules])
    server = vllm_server("vllm", tiny_model, logs / "vllm.log", options)
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent / "faulty"), os.environ.get("PYTHONPATH", "")]))
    server.env = {**server.env, VARIABLE: str(fault_folder), "PYTHONPATH": path}
    try:
        server.start().wait_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture
def client(engine: ServerProcess) -> VllmClient:
    return VllmClient(engine.url)
