"""Memory for what passes from HBM to HBM that is not there, or that NIXL does not take: said once, and done without."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from dynamo_connectors.blocks import Namespace
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.hbm_rows import HbmRows
from dynamo_connectors.peer_config import PeerConfig
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.transport import data_plane, server
from dynamo_connectors.transport.agent import GpuMemoryError, Region
from dynamo_connectors.vllm.peers import Shared, WorkerPeers, _why_no_hbm, check_role
from tools.server_process import free_port

ROW_BYTES, CPU = 4096, torch.device("cpu")
SPACE = Namespace("vllm", "m", "r", "d", "f", 16)


class HostAgent:
    """NIXL whose UCX knows no CUDA: it takes one region of rows, the host's, and the words beside it."""

    metadata = b"m"

    def __init__(self, name: str, regions: list[Region]) -> None:
        if sum(region.num_bytes >= ROW_BYTES for region in regions) > 1:
            raise GpuMemoryError("UCX is likely not configured with CUDA")

    def close(self) -> None: ...


def worker(dram: DramStore, hbm_bytes: int | None, device: torch.device = CPU) -> WorkerPeers:
    peer = PeerConfig(role="both", port=free_port(), hbm_bytes=hbm_bytes)
    return WorkerPeers(peer, 0, Shared(SPACE, dram, device))


def test_where_nixl_takes_no_gpu_memory_kv_goes_through_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "Agent", HostAgent)
    monkeypatch.setattr(data_plane, "Agent", HostAgent)
    dram, staging = DramStore(4, ROW_BYTES), DramStore(4, ROW_BYTES)
    peers = worker(dram, 8 * ROW_BYTES)
    assert peers.rows is not None
    tier = peers.make_tier(staging, peers.rows)
    assert not tier.reads_windows
    assert peers.take_counts()["nixl_windows_off", ""] == 2
    assert peers._server is not None
    assert peers._server._owner._offer.window is None
    assert peers.rows.rows.nbytes == 0, "nobody reads into it, and it is kept"
    assert tier.close(time.monotonic() + 60)
    peers.close()
    dram.close()
    staging.close()


def test_a_size_that_was_asked_for_and_holds_no_block_is_refused() -> None:
    dram = DramStore(4, ROW_BYTES)
    with pytest.raises(ConfigError, match="--kvbm-peer-hbm-gb is too small"):
        worker(dram, ROW_BYTES)
    dram.close()


def full_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2_500_000_000, 80_000_000_000))
    return torch.device("cuda", 0)


def test_a_gpu_that_is_full_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"wants 1\.02 GB .* 2\.50 are free, of which 2 stay so") as wrong:
        HbmRows(250_000, ROW_BYTES, full_gpu(monkeypatch))
    assert "\n" not in str(wrong.value)


@pytest.mark.parametrize("hbm_bytes", [None, 2 * 10**9])
def test_what_is_only_usual_is_left_out_on_a_full_gpu_and_what_was_asked_for_is_not(
    monkeypatch: pytest.MonkeyPatch, hbm_bytes: int | None
) -> None:
    monkeypatch.setattr(server, "Agent", HostAgent)
    dram, device = DramStore(4, ROW_BYTES), full_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2_100_000_000, 80_000_000_000))
    if hbm_bytes is not None:
        with pytest.raises(ConfigError, match="--kvbm-peer-hbm-gb"):
            worker(dram, hbm_bytes, device)
    else:
        peers = worker(dram, hbm_bytes, device)
        assert peers.rows is None
        assert peers.take_counts()["nixl_windows_off", ""] == 2
        peers.close()
    dram.close()


def vllm_config(**flags: object) -> Any:
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(**flags), parallel_config=SimpleNamespace(rank=0, world_size=1)
    )
    config.cache_config = SimpleNamespace(gpu_memory_utilization=0.9)
    return config


@pytest.mark.parametrize(
    ("total", "flags", "why"),
    [
        (141_000_000_000, {}, ""),
        (24_000_000_000, {}, "leaves 2.4 GB, 3 are wanted"),
        (141_000_000_000, {"enable_sleep_mode": True}, "sleep mode"),
        (141_000_000_000, {"enable_cumem_allocator": True}, "sleep mode"),
    ],
)
def test_the_usual_size_is_taken_only_where_it_stays_and_the_engine_has_room_beside(
    monkeypatch: pytest.MonkeyPatch, total: int, flags: dict[str, bool], why: str
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20_000_000_000, total))
    said = _why_no_hbm(PeerConfig(role="prefill"), vllm_config(**flags), torch.device("cuda", 0))
    assert why in said
    assert bool(said) == bool(why)


def test_a_size_that_was_asked_for_is_refused_beside_sleep_mode() -> None:
    config: Any = SimpleNamespace(peer=PeerConfig(role="prefill", hbm_bytes=10**9))
    geometry: Any = SimpleNamespace(groups=("full",), has_windows=False)
    with pytest.raises(ConfigError, match="--kvbm-peer-hbm-gb does not go with vLLM's sleep mode"):
        check_role(config, vllm_config(enable_sleep_mode=True), geometry)
