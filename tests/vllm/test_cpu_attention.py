"""A worker whose first step computes a few tokens behind a loaded prefix must survive it (`compat.prepare_cpu`)."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("vllm")

#: In a process of its own: one that has multiplied large matrices before is not in danger.
SCRIPT = """
import torch
import vllm._custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from dynamo_connectors.vllm.compat import prepare_cpu

current_platform.import_kernels()
prepare_cpu()
isa, heads, size, block, tokens, context = _get_attn_isa(torch.bfloat16, 32, 64), 2, 64, 32, 4, 900
query = torch.ones(tokens, heads, size, dtype=torch.bfloat16)
pages = torch.ones(30, heads, block, size, dtype=torch.bfloat16)
found = torch.zeros_like(query)
starts, lengths = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([context], dtype=torch.int32)
table = torch.arange(1, 30, dtype=torch.int32)[None]
plan = ops.cpu_attn_get_scheduler_metadata(
    1, heads, heads, size, lengths, torch.bfloat16, starts, True, -1, isa, True
)
ops.cpu_attention_with_kv_cache(
    query, pages, pages, found, starts, lengths, 0.125, True, None, -1, table, 0.0, plan, None
)
assert torch.equal(found, query), found
print("computed")
"""


def test_the_first_step_of_a_worker_may_be_a_few_tokens_long() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=280)
    assert run.stdout.strip().endswith("computed"), f"exit {run.returncode}: {run.stderr[-2000:]}"
