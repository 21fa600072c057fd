"""The one place that knows how vLLM versions differ. Every probe names what it looks for and since when it exists."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from dynamo_connectors.errors import PluginError

#: vLLM puts this block where a request has none, for instance behind a sliding window (BlockPool.null_block).
NULL_BLOCK_ID = 0


def engine_logger(name: str) -> logging.Logger:
    """A logger below vLLM's own, so that our lines look like the engine's and obey VLLM_LOGGING_LEVEL."""
    return logging.getLogger(f"vllm.{name}")


def require_supported_engine() -> None:
    """Raises `PluginError` for a vLLM that would only fail at its first request (before 0.32)."""
    from vllm.v1.core.sched.output import SchedulerOutput

    if "kv_connector_block_state" not in {field.name for field in dataclasses.fields(SchedulerOutput)}:
        raise PluginError(
            "dynamo needs vLLM 0.32 or newer: this one does not tell a connector the blocks of a step; "
            "upgrade it, or start without --kv-connector dynamo"
        )


def scheduled_block_ids(scheduler_output: Any, request_id: str) -> Sequence[int]:
    """The HBM blocks of a request scheduled in this step, first KV cache group."""
    block_ids: Sequence[int] = scheduler_output.kv_connector_block_state.get_block_ids(request_id)[0]
    return block_ids


def tokens_in_flight(request: Any) -> int:
    """Tokens of a step that is still running (0.32: `Request.num_in_flight_tokens`, async scheduling)."""
    return int(getattr(request, "num_in_flight_tokens", 0))


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
