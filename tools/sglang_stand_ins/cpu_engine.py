"""A test-only SGLang plugin, found through the dist-info folder beside it. Never part of the product.

It gives the CPU engine what only CUDA brings: host pools without cudaHostRegister, and L1 <-> L2 copies in torch. With
DYNAMO_TEST_ATTENTION also what MLA and sliding windows need (SGLang 0.5.23). And it takes away what DYNAMO_TEST_DRIFT
names, to imitate an SGLang of another version.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

#: Since 0.5.23, and before.
_MHA_POOLS = ("sglang.srt.mem_cache.pool_host.mha", "sglang.srt.mem_cache.memory_pool_host")
_ATTENTION = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    drift = os.environ.get("DYNAMO_TEST_DRIFT", "")
    if drift == "choices":
        target = "sglang.srt.server_args.ServerArgs.add_cli_args"
        HookRegistry.register(target, _drop_dynamic_choice, HookType.AFTER)
    elif drift:
        module, _, path = drift.partition(":")
        _delete(importlib.import_module(module), path)
    else:
        importlib.import_module("sglang.srt.mem_cache.pool_host.common").ALLOC_MEMORY_FUNCS["cpu"] = _allocate
        is_old = importlib.util.find_spec(_MHA_POOLS[0]) is None
        if is_old:
            importlib.import_module("older_engine").install()
        pools = [f"{_MHA_POOLS[is_old]}.MHATokenToKVPoolHost"]
        if "DYNAMO_TEST_ATTENTION" in os.environ:
            pools.append("sglang.srt.mem_cache.pool_host.mla.MLATokenToKVPoolHost")
            _absorb_latent_kv()
            for step in ("extend", "decode"):
                HookRegistry.register(f"{_ATTENTION}._run_sdpa_forward_{step}", _read_windows, HookType.BEFORE)
        for pool in pools:
            HookRegistry.register(f"{pool}.load_to_device_per_layer", _load, HookType.REPLACE)
            HookRegistry.register(f"{pool}.backup_from_device_all_layer", _backup, HookType.REPLACE)


def _delete(owner: Any, path: str) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    delattr(owner, name)


def _drop_dynamic_choice(_result: object, parser: Any, *_: object, **__: object) -> None:
    for action in parser._actions:
        if "--hicache-storage-backend" in action.option_strings:
            action.choices = [choice for choice in action.choices if choice != "dynamic"]


def _allocate(dims: Any, dtype: Any, *_: object, **__: object) -> torch.Tensor:
    return torch.empty(dims, dtype=dtype, device="cpu")


def _absorb_latent_kv() -> None:
    """MLA's other way to prefill writes the cache by a kernel of Triton's, which has no CPU."""
    registry = importlib.import_module("sglang.srt.models.deepseek_common.attention_backend_handler")
    method = registry.AttnForwardMethod.MLA
    registry.AttentionBackendRegistry.register("torch_native", lambda *_: method)


def _read_windows(backend: Any, *given: Any, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The CPU attention writes the layers of a window to their own slots, and reads them from those of the others."""
    if options.get("sliding_window_size") is None or not backend.use_sliding_window_kv_pool:
        return (backend, *given), options
    query, output, keys, values, table, rows, lengths, *rest = given
    slots = backend.token_to_kv_pool.translate_loc_from_full_to_swa(table[rows, : int(lengths.max())])
    return (backend, query, output, keys, values, slots, torch.arange(len(rows)), lengths, *rest), options


def _buffers(pool: Any, device_pool: Any) -> list[tuple[Any, Any]]:
    """(device layers, host buffer) for K, then for V; for MLA's latent KV there is one."""
    if hasattr(pool, "device_kv_buffers"):
        return [(pool.device_kv_buffers, pool.kv_buffer)]
    own = getattr(pool, "device_k_buffers", None)
    keys, values = (own, pool.device_v_buffers) if own is not None else (device_pool.k_buffer, device_pool.v_buffer)
    return [(keys, pool.k_buffer), (values, pool.v_buffer)]


def _host_index(pool: Any, layer: int, tokens: Any) -> tuple[Any, ...]:
    if pool.layout == "page_first_direct":
        return tokens // pool.page_size, layer, tokens % pool.page_size
    return (tokens, layer) if pool.layout == "page_first" else (layer, tokens)


def _load(
    pool: Any, device_pool: Any, host_indices: Any, device_indices: Any, layer_id: int, *_: object, **__: object
) -> None:
    host, device = host_indices.to(torch.int64), device_indices.to(torch.int64)
    for layers, buffer in _buffers(pool, device_pool):
        layers[layer_id][device] = buffer[_host_index(pool, layer_id, host)]


def _backup(pool: Any, device_pool: Any, host_indices: Any, device_indices: Any, *_: object, **__: object) -> None:
    host, device = host_indices.to(torch.int64), device_indices.to(torch.int64)
    for layer in range(pool.layer_num):
        for layers, buffer in _buffers(pool, device_pool):
            buffer[_host_index(pool, layer, host)] = layers[layer][device]
