"""Which steps are computed while a load arrives: only those whose layers have all been heard to ask, on real vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("vllm")

import torch
from dynamo_kernels import BlockView
from vllm.config import CUDAGraphMode
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.model_executor.layers.attention.mla_attention import MLAAttention

from dynamo_connectors.errors import DynamoConnectorsError
from dynamo_connectors.vllm.compat import kind_of_step
from dynamo_connectors.vllm.kv_pages import Pages
from dynamo_connectors.vllm.layer_hooks import LayerHooks
from dynamo_connectors.vllm.setup import BY_LAYERS_SETTING, layers_that_ask

PARTS = {"layer.0": 0, "layer.1": 1}


def step(hooks: LayerHooks, kind: str | None, asked: str, has_loads: bool = False) -> bool:
    waits = hooks.begin(kind, has_loads)
    hooks.check()
    if hooks.listens:
        for layer in asked.split():
            hooks.ask(layer)
    hooks.end()
    hooks.check()
    return waits


def test_a_kind_of_step_is_relied_on_after_all_its_layers_have_asked() -> None:
    hooks = LayerHooks(PARTS)
    assert not step(hooks, "NONE", "layer.0", has_loads=True)
    assert not hooks.may_come
    assert not step(hooks, "NONE", "layer.1 layer.0 one.more", has_loads=True)
    assert hooks.may_come
    assert step(hooks, "NONE", "layer.0 layer.1", has_loads=True)
    assert not step(hooks, "PIECEWISE", "layer.0 layer.1", has_loads=True), "nobody has heard one of that kind"
    assert not step(hooks, None, "", has_loads=True)
    assert step(hooks, "PIECEWISE", "layer.0 layer.1", has_loads=True)


def test_a_step_that_has_nothing_to_wait_for_costs_nothing() -> None:
    hooks = LayerHooks(PARTS)
    step(hooks, "NONE", "layer.0 layer.1")
    assert not hooks.begin("NONE", has_loads=False)
    assert not hooks.listens
    hooks.end()


def test_layers_say_which_part_they_read_and_unknown_ones_read_any() -> None:
    hooks = LayerHooks(PARTS)
    assert [hooks.ask(layer) for layer in ("layer.1", "layer.0", "draft")] == [1, 0, None]


def test_a_layer_that_did_not_wait_is_an_error_and_nothing_comes_by_layers_again() -> None:
    hooks = LayerHooks(PARTS)
    step(hooks, "NONE", "layer.0 layer.1")
    with pytest.raises(DynamoConnectorsError, match=r"1 of 2 layers .* layer\.1; restart .* DYNAMO_KVBM_BY_LAYERS=off"):
        step(hooks, "NONE", "layer.0", has_loads=True)
    assert not hooks.may_come


def test_a_step_that_broke_off_says_nothing_of_its_layers() -> None:
    hooks = LayerHooks(PARTS)
    step(hooks, "NONE", "layer.0 layer.1")
    assert hooks.begin("NONE", has_loads=True)
    hooks.end(is_broken=True)
    assert hooks.may_come
    hooks.begin("PIECEWISE", has_loads=True)
    for layer in PARTS:
        hooks.ask(layer)
    hooks.end(is_broken=True)
    assert not step(hooks, "PIECEWISE", "layer.0 layer.1", has_loads=True)


def test_where_no_layer_is_known_nothing_is_relied_on() -> None:
    hooks = LayerHooks({})
    assert not step(hooks, "NONE", "layer.0", has_loads=True)
    assert not hooks.may_come


def context(mode: CUDAGraphMode, metadata: Any, ubatches: Any = None) -> ForwardContext:
    return ForwardContext({}, metadata, {}, cudagraph_runtime_mode=mode, ubatch_slices=ubatches)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (context(CUDAGraphMode.NONE, {"layer": 1}), "NONE"),
        (context(CUDAGraphMode.PIECEWISE, {"layer": 1}), "PIECEWISE"),
        (context(CUDAGraphMode.FULL, {"layer": 1}), None),
        (context(CUDAGraphMode.NONE, None), None),
        (context(CUDAGraphMode.NONE, [{}, {}], [slice(0), slice(1)]), None),
        (None, None),
    ],
    ids=["eager", "pieces", "one graph", "no attention", "two micro-batches", "the V2 runner's graph"],
)
def test_how_a_step_is_computed(given: ForwardContext | None, kind: str | None) -> None:
    with override_forward_context(given):
        assert kind_of_step() == kind


def configs(layers: list[type], **changed: Any) -> tuple[Any, Pages]:
    names = [f"layer.{number}" for number in range(len(layers))]
    made = {name: layer.__new__(layer) for name, layer in zip(names, layers, strict=True)}
    for layer in made.values():
        torch.nn.Module.__init__(layer)
    vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=made),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=changed.get("fast_prefill", False)),
        speculative_config=changed.get("drafts"),
    )
    view = BlockView(tuple(torch.zeros((2, 8), dtype=torch.uint8) for _ in names))
    parts = {name: number for number, name in enumerate(names)}
    return vllm_config, Pages(view, "", changed.get("codec"), parts)


class Indexer(torch.nn.Module):
    """A layer with KV of its own that vLLM does not ask for, as DeepSeek's sparse attention has."""


@pytest.mark.parametrize(
    ("layers", "changed", "comes"),
    [
        ([Attention, Attention], {}, True),
        ([MLAAttention], {}, True),
        ([MLAAttention, Indexer], {}, False),
        ([Attention, ChunkedLocalAttention], {}, False),
        ([Attention], {"drafts": object()}, False),
        ([Attention], {"fast_prefill": True}, False),
        ([Attention], {"codec": object()}, False),
    ],
)
def test_which_models_get_loads_by_layers(layers: list[type], changed: Any, comes: bool) -> None:
    vllm_config, pages = configs(layers, **changed)
    assert layers_that_ask(vllm_config, pages) == {}, "on a CPU nothing goes on beside compute"
    with patch.object(BlockView, "device", torch.device("cuda")):
        assert layers_that_ask(vllm_config, pages) == (pages.part_of_layer if comes else {})


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_config, pages = configs([Attention])
    monkeypatch.setenv(BY_LAYERS_SETTING, "off")
    with patch.object(BlockView, "device", torch.device("cuda")):
        assert layers_that_ask(vllm_config, pages) == {}
