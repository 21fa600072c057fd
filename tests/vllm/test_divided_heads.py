"""Whose KV heads may be divided anew among another number of ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

from dynamo_connectors.blocks import Namespace
from dynamo_connectors.head_map import HeadPage, Heads
from dynamo_connectors.vllm.peers import Shared, _is_divided

HEADS = Heads((HeadPage(0, 1, 2, 8), HeadPage(16, 1, 2, 8)), "")


def is_divided(total: int, load_format: str = "auto", heads: Heads | None = HEADS) -> bool:
    space = Namespace("vllm", "m", "", "bf16", "print", 16, tp_rank=1, tp_size=4)
    config = SimpleNamespace(
        load_config=SimpleNamespace(load_format=load_format),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: total),
    )
    dram: Any = None
    return _is_divided(config, Shared(space, dram, torch.device("cpu"), heads))


def test_only_heads_that_one_rank_has_and_every_number_of_ranks_computes_alike() -> None:
    assert is_divided(8)
    assert not is_divided(4), "ranks keep copies of each other's heads"
    assert not is_divided(8, load_format="dummy"), "each rank makes up weights of its own"
    assert not is_divided(8, heads=None)
    assert not is_divided(8, heads=HEADS._replace(pages=(*HEADS.pages, HeadPage(32, 1, 1, 8)))), "a draft model's layer"
