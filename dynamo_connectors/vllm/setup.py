"""Builds the two halves from what vLLM tells a connector. All that reads `vllm_config` is here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from dynamo_connectors.block_manager import BlockManager, NamedTier
from dynamo_connectors.blocks import Namespace
from dynamo_connectors.config import HOST_DRAM, NVME_SSD, KvbmConfig, flag_of
from dynamo_connectors.errors import ConfigError, UnsupportedLayoutError
from dynamo_connectors.layout import KVLayout, page_layout
from dynamo_connectors.pinning import pin_host_memory
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.tiers.index import TierIndex
from dynamo_connectors.tiers.nvme import NvmeStore, slot_bytes
from dynamo_connectors.transfer import Stores
from dynamo_connectors.vllm.compat import engine_logger
from dynamo_connectors.vllm.kv_events import TierEvents
from dynamo_connectors.vllm.launch_flags import refuse_parallelism
from dynamo_connectors.vllm.scheduler import Limits, SchedulerHalf
from dynamo_connectors.vllm.worker import WorkerHalf

log = engine_logger(__name__)

#: Offloads may hold at most this share of HBM away from new requests.
_MAX_HELD_SHARE = 0.25


def check_model(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raises `ConfigError` when this model or parallelism cannot be tiered; better no server than a silent no-op."""
    groups = len(kv_cache_config.kv_cache_groups)
    if groups == 0:
        raise ConfigError("this model has no KV cache, nothing can be tiered; start without --kv-connector dynamo")
    if groups != 1:
        raise ConfigError(
            f"dynamo cannot tier this model yet: it has {groups} KV cache groups (hybrid attention); "
            "start without --kv-connector dynamo"
        )
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    if not isinstance(spec, FullAttentionSpec):
        raise ConfigError(
            f"dynamo cannot tier this model yet: its KV cache is a {type(spec).__name__}, not full attention; "
            "start without --kv-connector dynamo"
        )
    if not getattr(vllm_config.model_config, "is_prefix_caching_supported", True):
        # vLLM asks connectors all the same, and the first hit kills it (0.32, MEAN: "partial prefill").
        raise ConfigError(
            "vLLM does not support prefix caching for this model and pooling, so its KV cannot be used again; "
            "start without --kv-connector dynamo"
        )
    refuse_parallelism(vllm_config.parallel_config)


def build_scheduler_half(config: KvbmConfig, vllm_config: Any, kv_cache_config: Any) -> SchedulerHalf:
    block_size = block_size_tokens(kv_cache_config)
    capacities = tier_capacities(config, row_bytes(kv_cache_config), vllm_config.parallel_config.world_size)
    for name, blocks in capacities.items():
        log.info("dynamo: tier %s holds %d blocks of %d tokens", name, blocks, block_size)
    manager = BlockManager([NamedTier(name, TierIndex(blocks)) for name, blocks in capacities.items()])
    limits = Limits(
        block_size_tokens=block_size,
        offload_ratio=config.offload_ratio,
        num_workers=vllm_config.parallel_config.world_size,
        max_held_blocks=max(1, int(kv_cache_config.num_blocks * _MAX_HELD_SHARE)),
    )
    events_config = vllm_config.kv_events_config
    events_on = events_config is not None and events_config.enable_kv_cache_events
    return SchedulerHalf(manager, limits, TierEvents(block_size, events_on))


def build_worker_half(
    config: KvbmConfig, vllm_config: Any, kv_cache_config: Any, kv_caches: Mapping[str, torch.Tensor]
) -> WorkerHalf:
    tensors, layout = read_layout(kv_caches, kv_cache_config)
    capacities = tier_capacities(config, layout.row_bytes, vllm_config.parallel_config.world_size)
    on_gpu = tensors[0].device.type == "cuda"
    dram = DramStore(capacities[HOST_DRAM], layout.row_bytes, pin_host_memory if on_gpu else None)
    disk = None
    if NVME_SSD in capacities and config.nvme_path is not None:
        space = namespace(vllm_config, kv_cache_config, layout)
        try:
            disk = NvmeStore(config.nvme_path, capacities[NVME_SSD], layout.row_bytes, space)
        except BaseException:
            dram.close()
            raise
    return WorkerHalf(tensors, layout, Stores(dram, disk))


def block_size_tokens(kv_cache_config: Any) -> int:
    size: int = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    return size


def row_bytes(kv_cache_config: Any) -> int:
    """Bytes of one block over all layers of one worker, as vLLM plans them."""
    group = kv_cache_config.kv_cache_groups[0]
    size: int = group.kv_cache_spec.page_size_bytes * len(group.layer_names)
    return size


def tier_capacities(config: KvbmConfig, block_bytes: int, num_workers: int) -> dict[str, int]:
    """Tier -> blocks of one worker. Scheduler and workers get the same numbers from the same arguments."""
    sizes = {HOST_DRAM: (config.host_dram_bytes, block_bytes, "kvbm_host_dram_gb")}
    if NVME_SSD in config.storage_tiers:
        sizes[NVME_SSD] = (config.nvme_bytes, slot_bytes(block_bytes), "kvbm_nvme_gb")
    capacities: dict[str, int] = {}
    for tier, (total_bytes, each_bytes, setting) in sizes.items():
        blocks = total_bytes // num_workers // each_bytes
        if blocks < 1:
            raise ConfigError(
                f"{flag_of(setting)} is too small: one block of this model takes {each_bytes / 1e6:.2f} MB "
                f"on each of {num_workers} worker(s)"
            )
        capacities[tier] = blocks
    return capacities


def read_layout(kv_caches: Mapping[str, torch.Tensor], kv_cache_config: Any) -> tuple[list[torch.Tensor], KVLayout]:
    """The KV tensors of one worker, in the group's order, and how their pages lie in memory."""
    tensors: list[torch.Tensor] = []
    pages = []
    for layer in kv_cache_config.kv_cache_groups[0].layer_names:
        tensor = kv_caches[layer]
        if not isinstance(tensor, torch.Tensor) or tensor.shape[0] != kv_cache_config.num_blocks:
            raise UnsupportedLayoutError(
                f"layer {layer}: the KV cache is not one tensor with {kv_cache_config.num_blocks} blocks first; "
                "dynamo cannot tier this attention backend, start without --kv-connector dynamo"
            )
        item = tensor.element_size()
        pages.append(page_layout(layer, tuple(tensor.shape), tensor.stride(), item, tensor.storage_offset() * item))
        tensors.append(tensor)
    layout = KVLayout(tuple(pages))
    if layout.row_bytes != row_bytes(kv_cache_config):
        raise UnsupportedLayoutError(
            f"one block takes {layout.row_bytes} bytes in memory, vLLM planned {row_bytes(kv_cache_config)}; "
            "dynamo cannot tier this layout, start without --kv-connector dynamo"
        )
    return tensors, layout


def namespace(vllm_config: Any, kv_cache_config: Any, layout: KVLayout) -> Namespace:
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    # vLLM's block hashes carry LoRA, multimodal items and cache salt; the algorithm decides what equal hashes mean.
    rules = f"{getattr(cache, 'prefix_caching_hash_algo', '')}"
    return Namespace(
        engine="vllm",
        model=str(model.model),
        revision=str(model.revision),
        dtype=f"{model.dtype}/{cache.cache_dtype}",
        layout_fingerprint=f"{getattr(kv_cache_config, 'kv_cache_layout', None)}:{layout.fingerprint}",
        block_size_tokens=block_size_tokens(kv_cache_config),
        tp_rank=parallel.rank % parallel.tensor_parallel_size,
        tp_size=parallel.tensor_parallel_size,
        key_rules=rules,
    )
