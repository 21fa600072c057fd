"""What the SGLang tests share: a backend over a fake host pool, and one real server for the whole session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_connectors.sglang.backend import HiCacheBackend
from tests.sglang.host_pool import FakeHostPool
from tests.sglang.server import Server, make_server
from tests.sglang.tiny_model import write_tiny_model

MakeBackend = Callable[..., HiCacheBackend]


def storage_config(directory: Path, **changes: Any) -> SimpleNamespace:
    """SGLang's HiCacheStorageConfig, as far as we read it."""
    extra = {"interface_v1": 1, "kvbm_nvme_path": str(directory), "kvbm_nvme_gb": 0.001}
    facts = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "model_name": "tiny",
        "extra_config": extra | changes.pop("extra_config", {}),
    }
    return SimpleNamespace(**(facts | changes))


@pytest.fixture
def make_backend(tmp_path: Path) -> Iterator[MakeBackend]:
    made: list[HiCacheBackend] = []
    (tmp_path / "kv").mkdir()

    def make(
        pool: FakeHostPool | None = None, kind: type[HiCacheBackend] = HiCacheBackend, **changes: Any
    ) -> HiCacheBackend:
        backend = kind(storage_config(tmp_path / "kv", **changes))
        made.append(backend)
        if pool is not None:
            backend.register_mem_pool_host(pool)
            backend.open()
        return backend

    yield make
    for backend in made:
        backend.check()
        backend.close()
        backend.check()
    assert not list((tmp_path / "kv").glob("*.tmp")), "half a file was left behind"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = make_server(tiny_model, tmp_path_factory.mktemp("sglang_server"))
    try:
        running.process.start().wait_ready()
        yield running
    finally:
        running.process.stop()
