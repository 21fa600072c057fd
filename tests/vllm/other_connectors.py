"""Connectors that stand beside dynamo in a `MultiConnector`: each claims to have KV, and brings none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, SupportsHMA

BLOCK = 32


@dataclass
class BlocksToLoad(KVConnectorMetadata):
    blocks: list[int] = field(default_factory=list)


class _Other(KVConnectorBase_V1, SupportsHMA):
    """Has, so it says, every full block of the requests whose names start with `prefix`."""

    prefix = ""
    loads_asynchronously = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._planned: list[int] = []
        self._failed: set[int] = set()

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        if not request.request_id.startswith(self.prefix) or request.num_preemptions:
            return 0, False
        tokens = max(0, (request.num_tokens - 1) // BLOCK * BLOCK - num_computed_tokens)
        return tokens, self.loads_asynchronously and tokens > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            self._planned += blocks.get_block_ids()[0][: num_external_tokens // BLOCK]

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        planned, self._planned = self._planned, []
        return BlocksToLoad(planned)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        return False, None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...
    def wait_for_layer_load(self, layer_name: str) -> None: ...
    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_for_save(self) -> None: ...
    def register_kv_caches(self, kv_caches: Any) -> None: ...


class SlowRemote(_Other):
    """Loads asynchronously, as NixlConnector does; what it loads arrives when a test says so."""

    prefix = "remote"
    loads_asynchronously = True
    arrived: ClassVar[set[str]] = set()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, set[str] | None]:
        arrived = set(self.arrived)
        self.arrived.clear()
        return None, arrived or None


class FailingInStep(_Other):
    """Loads within the step that computes, as LMCache does, and always fails."""

    prefix = "in-step"

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, BlocksToLoad)
        self._failed = set(metadata.blocks)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed
