"""The one place that knows how vLLM versions differ. Every probe names what it looks for and since when it exists."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Sequence
from typing import Any

from dynamo_connectors.errors import PluginError

#: vLLM puts this block where a request has none, for instance behind a sliding window (BlockPool.null_block).
NULL_BLOCK_ID = 0


def engine_logger(name: str) -> logging.Logger:
    """A logger below vLLM's own, so that our lines look like the engine's and obey VLLM_LOGGING_LEVEL."""
    return logging.getLogger(f"vllm.{name}")


def log_where_the_engine_logs() -> None:
    """Rooms that know no engine log under our own name: their lines go where vLLM's go, at vLLM's level."""
    engine, ours = logging.getLogger("vllm"), logging.getLogger("dynamo_connectors")
    ours.setLevel(engine.level)
    for handler in engine.handlers:
        ours.addHandler(handler)  # once, however often it is called


def require_supported_engine() -> None:
    """Raises `PluginError` for a vLLM that would only fail at its first request (before 0.24)."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    for hook in ("bind_gpu_block_pool", "on_new_request", "build_connector_worker_meta", "has_pending_push_work"):
        if not hasattr(KVConnectorBase_V1, hook):
            raise PluginError(
                f"dynamo needs vLLM 0.24 or newer: this one's connectors have no {hook}; "
                "upgrade it, or start without --kv-connector dynamo"
            )


def prepare_cpu() -> None:
    """vLLM's CPU attention computes on AMX tiles and leaves it to a larger matrix product to ask the system for them.

    A first step of a few tokens, behind a prefix that was loaded, has no such product: the system kills the worker.
    """
    import torch

    init_amx = getattr(torch.cpu, "_init_amx", None)  # since torch 2.6; False where there is no AMX
    if init_amx is not None:
        init_amx()


def page_readers(vllm_config: Any, device: Any) -> list[str]:
    """Who decides what the bytes inside a page mean: the attention backends and, on a CPU, its instruction set.

    vLLM's CPU attention packs pages for AMX tiles where there are some, in the shape that all CPUs have.
    """
    import torch

    layers = vllm_config.compilation_config.static_forward_context.values()
    readers = {layer.get_attn_backend().get_name() for layer in layers if hasattr(layer, "get_attn_backend")}
    if device.type == "cpu":
        has_amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()  # since torch 2.6
        readers |= {platform.machine(), f"amx={has_amx}"}
    return sorted(readers)


#: Exactly these ask before they read (`wait_for_layer_load`); what their subclasses and others do nobody has looked at.
_ASKING = (
    "vllm.model_executor.layers.attention.attention.Attention",
    "vllm.model_executor.layers.attention.mla_attention.MLAAttention",
)


def asks_before_it_reads(layer: Any) -> bool:
    """Whether vLLM asks the connector for this layer before it reads the layer's KV, where it asks at all."""
    kind = type(layer)
    # With a cache of its own in host memory a layer reads more than what its attention is called for.
    return f"{kind.__module__}.{kind.__qualname__}" in _ASKING and getattr(layer, "hisparse_cache", None) is None


def kind_of_step() -> str | None:
    """How the step is computed that is about to be; None where its layers ask for nothing, or run on two streams.

    While one graph is replayed no Python runs; for such a step the V2 runner sets no forward context at all.
    """
    from vllm.forward_context import get_forward_context, is_forward_context_available

    context = get_forward_context() if is_forward_context_available() else None
    if context is None or context.attn_metadata is None or context.ubatch_slices is not None:
        return None
    mode = str(context.cudagraph_runtime_mode.name)
    return mode if mode in ("NONE", "PIECEWISE") else None


def tokens_in_flight(request: Any) -> int:
    """Tokens of a step that is still running (async scheduling): they count as computed, and are not yet.

    Before 0.26 only the tokens to be sampled are known, so the chunk of a prefill that is aborted meanwhile counts as
    computed. It will be: the worker has the step already, and copies what is stored after it.
    """
    in_flight = getattr(request, "num_in_flight_tokens", None)
    return int(request.num_output_placeholders if in_flight is None else in_flight)


def is_answered(request: Any) -> bool:
    """Whether a request that has ended has an answer: it was not aborted, refused or failed."""
    return getattr(request.status, "name", "") in ("FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED")


def hashes_end_with_process(algorithm: str) -> bool:
    """Whether block hashes start from a random number here, so that no later process finds what is kept under them.

    Before 0.29 always, from then on with an algorithm that is not cryptographic; a fixed PYTHONHASHSEED prevents it.
    """
    from vllm.v1.core import kv_cache_utils

    if "PYTHONHASHSEED" in os.environ:
        return False
    return "xxhash" in algorithm or not hasattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED")


def loads_within_step(scheduler_output: Any) -> bool | None:
    """Whether another connector loads KV within the step. Such a load may fail, and with it what the step computes.

    None before 0.29, where no step tells.
    """
    told: bool | None = getattr(scheduler_output, "has_sync_kv_loads", None)
    return told


class BlockTables:
    """The HBM blocks of the requests that a step schedules, one table per KV cache group.

    From 0.30 the step itself answers (`kv_connector_block_state`). Before, it tells only what changed, so the tables
    are kept here: a request that starts or resumes comes with all its blocks, one that goes on with the added ones.
    Nothing takes a block away from a running request in between, as long as the group is of full attention.
    """

    def __init__(self) -> None:
        self._state: Any = None
        self._tables: dict[str, tuple[list[int], ...]] = {}

    def follow(self, scheduler_output: Any) -> None:
        """Call it once for every step, in order."""
        state = getattr(scheduler_output, "kv_connector_block_state", None)
        # 0.29 has such a state too, but leaves out requests without new blocks.
        self._state = state if hasattr(state, "get_block_ids") else None
        if self._state is not None:
            return
        for request_id in scheduler_output.finished_req_ids:
            self._tables.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            self._tables[new.req_id] = tuple(list(table) for table in new.block_ids)
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, added in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in cached.resumed_req_ids:
                for table in self._tables[request_id]:
                    table.clear()
            if added is not None:
                for table, blocks in zip(self._tables[request_id], added, strict=True):
                    table.extend(blocks)

    def blocks_of(self, request_id: str) -> Sequence[Sequence[int]]:
        """Of a request that the last step schedules; read it before the next one."""
        if self._state is None:
            return self._tables[request_id]
        blocks: Sequence[Sequence[int]] = self._state.get_block_ids(request_id)
        return blocks


def tells_block_tables() -> bool:
    """Whether each step tells the block tables as they are (0.30), blocks that a window has left included."""
    from vllm.v1.core.sched import output

    return hasattr(getattr(output, "KVConnectorBlockState", None), "get_block_ids")


def names_kv_dimensions() -> bool:
    """Whether every layer's KV is shown as [blocks, heads, tokens, key and value], however it lies (0.32)."""
    from importlib.util import find_spec

    return find_spec("vllm.v1.kv_cache_layout") is not None


def layout_to_divide() -> str:
    """What the engine calls the layout in which each head of a page lies in one piece: in MultiConnector one word."""
    return "LBHNC" if names_kv_dimensions() else "HND"


class HbmHolds:
    """Keeps HBM blocks from being re-used while a background copy reads them, by one more reference each."""

    def __init__(self, block_pool: Any) -> None:
        self._pool = block_pool
        self._held = 0

    def hold(self, block_ids: Sequence[int]) -> None:
        self._pool.touch([self._pool.blocks[block_id] for block_id in block_ids])
        self._held += len(block_ids)

    def release(self, block_ids: Sequence[int]) -> None:
        # The tail of a chain is freed, and so evicted, before the head it hangs on.
        self._pool.free_blocks([self._pool.blocks[block_id] for block_id in reversed(block_ids)])
        self._held -= len(block_ids)

    @property
    def held_blocks(self) -> int:
        return self._held
