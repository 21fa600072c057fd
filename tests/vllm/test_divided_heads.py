"""Whose KV heads may be divided anew among another number of ranks, and the layout that this needs."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout

from dynamo_connectors.blocks import Namespace
from dynamo_connectors.config import parse_config
from dynamo_connectors.head_map import HeadPage, Heads
from dynamo_connectors.vllm.connector import DynamoConnector
from dynamo_connectors.vllm.peers import Shared, worker_peers
from tools.server_process import free_port

HEADS = Heads((HeadPage(0, 1, 2, 8), HeadPage(16, 1, 2, 8)), "")


def config(total: int = 8, load_format: str = "auto", rank: int = 0, **settings: object) -> Any:
    """Of four ranks that share so many heads."""
    extra = {"kvbm_host_dram_gb": 0.01, "kvbm_role": "prefill", "kvbm_peer_port": free_port(4), **settings}
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra),
        load_config=SimpleNamespace(load_format=load_format),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: total, use_mla=settings.pop("mla", False)),
        parallel_config=SimpleNamespace(rank=rank, world_size=4),
    )


def divided(vllm_config: Any, monkeypatch: pytest.MonkeyPatch, heads: Heads | None = HEADS) -> bool:
    served: list[Shared] = []
    monkeypatch.setattr("dynamo_connectors.vllm.peers.WorkerPeers", lambda peer, rank, shared: served.append(shared))
    space = Namespace("vllm", "m", "", "bf16", "print", 16, tp_rank=1, tp_size=4)
    dram: Any = None
    settings = parse_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
    worker_peers(settings, vllm_config, Shared(space, dram, torch.device("cpu"), heads))
    return served[0].heads is not None


#: A draft model's layer among them.
UNEVEN = HEADS._replace(pages=(*HEADS.pages, HeadPage(32, 1, 1, 8)))


@pytest.mark.parametrize(
    ("changes", "heads", "words"),
    [
        ({}, HEADS, ""),
        ({"total": 4}, HEADS, "not every one of its 4 ranks has its own, even share of 4 KV heads"),
        ({}, UNEVEN, "even share"),
        ({"load_format": "dummy"}, HEADS, "weights of its own"),
        ({}, None, "VLLM_KV_CACHE_LAYOUT=HND"),
        ({"kvbm_compression": "int8"}, None, "compressed"),
        ({"mla": True}, None, "MLA"),
    ],
)
def test_who_cannot_be_read_by_another_number_of_ranks_says_so_at_the_start(
    changes: dict[str, Any],
    heads: Heads | None,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO, "vllm"):
        assert divided(config(**changes), monkeypatch, heads) == (not words)
    lines = [record.getMessage() for record in caplog.records if "--tensor-parallel-size" in record.getMessage()]
    assert len(lines) == bool(words)
    assert all(words in line for line in lines)
    caplog.clear()
    divided(config(**changes, rank=1), monkeypatch, heads)
    assert not caplog.records, "it is said once"


def asked(vllm_config: Any) -> str | None:
    return DynamoConnector.get_required_kvcache_layout(vllm_config)


def test_only_engines_with_a_role_ask_for_heads_that_lie_one_behind_the_other() -> None:
    assert asked(config()) == asked(config(kvbm_role="decode")) == "LBHNC"
    assert asked(config(kvbm_role="off-by-typo")) is None, "the constructor refuses that in one line"
    assert asked(config(kvbm_compression="int8")) is None
    assert asked(config(mla=True)) is None
    without = config()
    without.kv_transfer_config.kv_connector_extra_config = {"kvbm_host_dram_gb": 0.01}
    assert asked(without) is None


@pytest.mark.parametrize(
    ("supported", "environment", "chosen"),
    [(["LBNHC", "LBHNC"], None, "LBHNC"), (["LBNHC", "LBHNC"], "NHD", "LBNHC"), (["LBNHC"], None, "LBNHC")],
    ids=["backend that has it", "user who names another", "backend without it"],
)
def test_vllm_takes_that_layout_where_it_can(
    supported: list[str], environment: str | None, chosen: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.vllm.version_scenario import engine_config

    if environment is not None:
        monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", environment)
    role = ["--kv-connector", "dynamo", "--kvbm-host-dram-gb", "0.01", "--kvbm-role", "decode"]
    assert resolve_kv_cache_layout(engine_config(str(tiny_model), *role), [supported]).name == chosen
