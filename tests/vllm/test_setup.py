"""Models and parallelism that cannot be tiered are refused by name: better no server than wrong or useless KV."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from dynamo_connectors.errors import ConfigError
from dynamo_connectors.vllm.setup import check_model

FULL = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
SLIDING = SlidingWindowSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=128)


def configs(*specs: Any, prefix_caching: bool = True, **parallel: int) -> tuple[Any, Any]:
    sizes = {"pipeline_parallel_size": 1, "decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    sizes.update(parallel)
    model = SimpleNamespace(is_prefix_caching_supported=prefix_caching)
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(**sizes), model_config=model)
    return vllm_config, SimpleNamespace(kv_cache_groups=groups)


def test_one_group_of_full_attention_is_taken() -> None:
    check_model(*configs(FULL))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (configs(FULL, FULL), "2 KV cache groups"),
        (configs(), "no KV cache"),
        (configs(SLIDING), "SlidingWindowSpec"),
        (configs(FULL, pipeline_parallel_size=2), "--pipeline-parallel-size"),
        # A block of the scheduler then spans several blocks of a worker, so blocks would be taken for full too early.
        (configs(FULL, decode_context_parallel_size=2), "--decode-context-parallel-size"),
        (configs(FULL, prefill_context_parallel_size=2), "--prefill-context-parallel-size"),
        # Pooling over all tokens (MEAN, CLS): on 0.32 the first hit is a fatal error in the worker.
        (configs(FULL, prefix_caching=False), "prefix caching"),
    ],
)
def test_what_cannot_be_tiered_is_refused_by_name(given: tuple[Any, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_model(*given)
