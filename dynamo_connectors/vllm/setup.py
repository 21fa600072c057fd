"""Builds the two halves from what vLLM tells a connector. All that reads `vllm_config` is here."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import torch
import vllm
from dynamo_kernels.compression import Compression
from dynamo_kernels.errors import CopyError

from dynamo_connectors.block_manager import BlockManager, NamedTier
from dynamo_connectors.blocks import Namespace
from dynamo_connectors.config import HOST_DRAM, NVME_SSD, OBJECT_STORE, KvbmConfig, flag_of
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.eviction import POLICIES
from dynamo_connectors.load_gate import LoadGate
from dynamo_connectors.numa import nearest_node
from dynamo_connectors.pinning import pin_host_memory
from dynamo_connectors.tiers.chunks import capacity_chunks_for, chunk_blocks_for
from dynamo_connectors.tiers.disk_probe import read_rate
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.tiers.index import TierIndex
from dynamo_connectors.tiers.nvme import NvmeStore, slot_bytes
from dynamo_connectors.tiers.object import ObjectSettings, ObjectStore
from dynamo_connectors.tiers.object_format import object_bytes
from dynamo_connectors.transfer import Stores
from dynamo_connectors.vllm.adapters import place_of
from dynamo_connectors.vllm.compat import (
    asks_before_it_reads,
    engine_logger,
    hashes_end_with_process,
    page_readers,
    prepare_cpu,
    tells_block_tables,
)
from dynamo_connectors.vllm.groups import Geometry
from dynamo_connectors.vllm.kv_events import TierEvents
from dynamo_connectors.vllm.kv_pages import Pages, planned_row_bytes, read_geometry, read_pages
from dynamo_connectors.vllm.lasting import LastingTiers
from dynamo_connectors.vllm.launch_flags import refuse_parallelism
from dynamo_connectors.vllm.live import Limits
from dynamo_connectors.vllm.peers import Shared, check_role, identity_of, trust_of, worker_peers
from dynamo_connectors.vllm.scheduler import SchedulerHalf
from dynamo_connectors.vllm.worker import WorkerHalf
from dynamo_connectors.weights import can_be_met_again, weights_identity

log = engine_logger(__name__)

#: Offloads may hold at most this share of HBM away from new requests.
_MAX_HELD_SHARE = 0.25
_FIRST_WITH_FP8 = (8, 9)
#: `off`: every load arrives at once. For comparing, and for what nobody has foreseen.
BY_LAYERS_SETTING = "DYNAMO_KVBM_BY_LAYERS"


def check_model(vllm_config: Any, kv_cache_config: Any, compression: str | None = None) -> None:
    """Raises `ConfigError` when this model or parallelism cannot be tiered; better no server than a silent no-op."""
    geometry = read_geometry(kv_cache_config)
    if (len(geometry.groups) > 1 or geometry.has_windows) and not tells_block_tables():
        raise ConfigError(
            "dynamo needs vLLM 0.32 or newer for models with sliding windows or several KV cache groups: this one does "
            "not tell which blocks a window has left; start without --kv-connector dynamo"
        )
    if not getattr(vllm_config.model_config, "is_prefix_caching_supported", True):
        # vLLM asks connectors all the same, and the first hit kills it (0.32, MEAN: "partial prefill").
        raise ConfigError(
            "vLLM does not support prefix caching for this model and pooling, so its KV cannot be used again; "
            "start without --kv-connector dynamo"
        )
    refuse_parallelism(vllm_config.parallel_config)
    if compression is not None:
        planned_row_bytes(kv_cache_config, compression)


def build_scheduler_half(config: KvbmConfig, vllm_config: Any, kv_cache_config: Any) -> SchedulerHalf:
    geometry = read_geometry(kv_cache_config)
    num_workers = vllm_config.parallel_config.world_size
    row_bytes = planned_row_bytes(kv_cache_config, config.compression)
    capacities = tier_capacities(config, row_bytes, num_workers)
    tiers = []
    for name, entries in capacities.items():
        chunk = chunk_blocks_for(row_bytes) if name == OBJECT_STORE else 1
        log.info("dynamo: tier %s holds %d blocks of %d bytes on each worker", name, entries * chunk, row_bytes)
        policy = POLICIES[config.eviction_policy](entries)
        tiers.append(NamedTier(name, TierIndex(entries, policy, erases=name == OBJECT_STORE), chunk))
    limits = Limits(
        geometry=geometry,
        offload_ratio=config.offload_ratio,
        num_workers=num_workers,
        max_held_blocks=max(1, int(kv_cache_config.num_blocks * _MAX_HELD_SHARE)),
        block_bytes=row_bytes,
        copies_beside=vllm_config.device_config.device_type == "cuda",
        shares_loads=bool(vllm_config.cache_config.enable_prefix_caching),
        lasting_tiers=tuple(name for name in (NVME_SSD, OBJECT_STORE) if name in capacities),
        find_seconds=config.object_deadline_seconds,
    )
    if limits.lasting_tiers and hashes_end_with_process(vllm_config.cache_config.prefix_caching_hash_algo):
        log.warning(
            "dynamo: this vLLM names blocks anew at every start, so no other process finds what it keeps in %s; "
            "set PYTHONHASHSEED to a fixed number",
            " and ".join(limits.lasting_tiers),
        )
    events_config = vllm_config.kv_events_config
    events = TierEvents(geometry, events_config is not None and events_config.enable_kv_cache_events)
    gate = LoadGate() if config.load_gate else None
    check_role(config, vllm_config, geometry)
    half = SchedulerHalf(BlockManager(tiers, config.min_touches), limits, events, gate, time.monotonic)
    half.take_role(identity_of(config, vllm_config), trust_of(config))
    return half


def build_worker_half(
    config: KvbmConfig, vllm_config: Any, kv_cache_config: Any, kv_caches: Mapping[str, torch.Tensor]
) -> WorkerHalf:
    pages = read_pages(kv_caches, kv_cache_config, config.compression)
    geometry, num_workers = read_geometry(kv_cache_config), vllm_config.parallel_config.world_size
    row_bytes = planned_row_bytes(kv_cache_config, config.compression)
    capacities = tier_capacities(config, row_bytes, num_workers)
    _refuse_old_gpu(pages)
    if pages.view.device.type == "cuda":
        _measure_copy_paths(pages.view.device, max(pages.view.part_bytes))
    elif pages.view.device.type == "cpu":
        prepare_cpu()
    dram = _host_memory(capacities[HOST_DRAM], pages)
    space = namespace(vllm_config, geometry, pages)
    disk: NvmeStore | None = None
    objects: ObjectStore | None = None
    disk_rate: float | None = None
    try:
        if NVME_SSD in capacities and config.nvme_path is not None:
            lasts = can_be_met_again(space.weights)
            disk = NvmeStore(config.nvme_path, capacities[NVME_SSD], pages.row_bytes, space, lasts)
            log.info("dynamo: disk slab %s, %d blocks of an earlier run", disk.path, len(disk.recovered))
            if config.load_gate:
                disk_rate = read_rate(disk)
                log.info("dynamo: the disk tier reads %.2f GB/s", (disk_rate or 0.0) / 1e9)
        if OBJECT_STORE in capacities and config.object_url is not None:
            settings = ObjectSettings(config.object_url, config.object_endpoint_url, config.object_deadline_seconds)
            chunk = chunk_blocks_for(row_bytes)
            objects = ObjectStore(settings, pages.row_bytes, chunk, space)
        peers = worker_peers(config, vllm_config, Shared(space, dram, pages.view.device, pages.heads))
    except BaseException:
        for store in (disk, dram):
            if store is not None:
                store.close()
        if objects is not None:
            objects.close(time.monotonic() + 1)
        raise
    lasting = LastingTiers(disk, objects, capacities.get(OBJECT_STORE, 0), disk_rate)
    reader = peers if peers is not None and config.peer.reads else None
    make_tier, rows = (None, None) if reader is None else (reader.make_tier, reader.rows)
    stores = Stores(dram, disk, objects, codec=pages.codec, peer=make_tier, peer_rows=rows)
    return WorkerHalf(pages.view, stores, lasting, len(geometry.groups), peers, layers_that_ask(vllm_config, pages))


def layers_that_ask(vllm_config: Any, pages: Pages) -> Mapping[str, int]:
    """Layer -> the part of a block that holds its KV; empty where a load must not arrive layer by layer.

    On a CPU nothing goes on beside compute. A draft model reads KV in steps of its own, about which nobody asks; with
    fast prefill not every step computes every layer. Compressed rows are expanded at once.
    """
    config = vllm_config.compilation_config
    drafts = getattr(vllm_config, "speculative_config", None) is not None
    skips = getattr(vllm_config.cache_config, "kv_sharing_fast_prefill", False)
    is_off = os.environ.get(BY_LAYERS_SETTING, "") == "off"
    if pages.view.device.type != "cuda" or pages.codec is not None or drafts or skips or is_off:
        return {}
    layers = [config.static_forward_context.get(name) for name in pages.part_of_layer]
    return pages.part_of_layer if all(map(asks_before_it_reads, layers)) else {}


def _refuse_old_gpu(pages: Pages) -> None:
    if pages.codec is None or pages.codec.compression is not Compression.FP8 or pages.view.device.type != "cuda":
        return
    if torch.cuda.get_device_capability(pages.view.device) < _FIRST_WITH_FP8:
        raise ConfigError("this GPU has no FP8 (compute capability 8.9 has it); write --kvbm-compression int8")


def _measure_copy_paths(device: torch.device, fragment_bytes: int) -> None:
    """Once a device and driver: what earlier starts found is used at once, some of what is missing is added."""
    from dynamo_kernels.calibration import calibrate

    try:
        found = calibrate(device, fragment_bytes=fragment_bytes)
    except (RuntimeError, OSError, CopyError) as error:
        log.warning("dynamo: copy paths could not be measured (%s); the rules of thumb choose them", error)
    else:
        log.info(
            "dynamo: copy paths of %s, %d cases, measured in %.1f s", found.device, len(found.figures), found.seconds
        )


def _host_memory(blocks: int, pages: Pages) -> DramStore:
    """For a GPU it is pinned, and lies on the GPU's NUMA node."""
    device = pages.view.device
    if device.type != "cuda":
        return DramStore(blocks, pages.row_bytes)
    node = nearest_node(torch.cuda.get_device_properties(device))
    return DramStore(blocks, pages.row_bytes, pin_host_memory, node)


def tier_capacities(config: KvbmConfig, row_bytes: int, num_workers: int) -> dict[str, int]:
    """Tier -> entries of one worker: blocks, or objects. Scheduler and workers get the same from the same arguments."""
    sizes = {HOST_DRAM: (config.host_dram_bytes, row_bytes, "kvbm_host_dram_gb")}
    if NVME_SSD in config.storage_tiers:
        sizes[NVME_SSD] = (config.nvme_bytes, slot_bytes(row_bytes), "kvbm_nvme_gb")
    capacities: dict[str, int] = {}
    for tier, (total_bytes, each_bytes, setting) in sizes.items():
        blocks = total_bytes // num_workers // each_bytes
        if blocks < 1:
            raise ConfigError(
                f"{flag_of(setting)} is too small: one block of this model takes {each_bytes / 1e6:.2f} MB "
                f"on each of {num_workers} worker(s)"
            )
        capacities[tier] = blocks
    if OBJECT_STORE in config.storage_tiers:
        each_bytes = object_bytes(row_bytes, chunk_blocks_for(row_bytes))
        capacities[OBJECT_STORE] = capacity_chunks_for(config.object_bytes // num_workers, each_bytes)
    return capacities


def namespace(vllm_config: Any, geometry: Geometry, pages: Pages) -> Namespace:
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    # vLLM's block hashes carry LoRA, multimodal items and cache salt; the algorithm decides what equal hashes mean.
    # What a page means inside is the engine's business and may change with its version; so may what a model computes.
    media = getattr(getattr(model, "multimodal_config", None), "mm_processor_kwargs", None)
    readers = page_readers(vllm_config, pages.view.device)
    hashes = getattr(cache, "prefix_caching_hash_algo", "")
    rules = (hashes, geometry, vllm.__version__, model.compute_hash(), media, readers)
    compressed = "" if pages.codec is None else f"/{pages.codec.compression.value}"
    return Namespace(
        engine="vllm",
        model=str(model.model),
        revision=str(model.revision),
        dtype=f"{model.dtype}/{cache.cache_dtype}/{pages.view.device.type}{compressed}",
        layout_fingerprint=pages.fingerprint,
        block_size_tokens=geometry.hash_tokens,
        tp_rank=parallel.rank % parallel.tensor_parallel_size,
        tp_size=parallel.tensor_parallel_size,
        key_rules=repr(rules),
        weights=_weights(vllm_config),
    )


def _weights(vllm_config: Any) -> str:
    """The model's, and the draft model's: its KV lies in the same rows."""
    drafter = getattr(getattr(vllm_config, "speculative_config", None), "draft_model_config", None)
    models = [model for model in (vllm_config.model_config, drafter) if model is not None]
    load_format = str(vllm_config.load_config.load_format)
    return " ".join(
        weights_identity(place_of(str(model.model), model.revision), load_format, model.seed) for model in models
    )
