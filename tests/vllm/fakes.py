"""Plain stand-ins for vLLM's request and HBM block pool, for tests of the scheduler half alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dynamo_connectors.block_manager import Change
from dynamo_connectors.blocks import BlockKey


@dataclass
class FakeRequest:
    request_id: str
    block_hashes: list[BlockKey]


def request(name: str, blocks: int, prefix: str = "") -> FakeRequest:
    """Requests with the same `prefix` share block hashes."""
    return FakeRequest(name, [BlockKey(f"{prefix or name}-{index}".encode()) for index in range(blocks)])


@dataclass
class FakeHolds:
    held: Counter[int] = field(default_factory=Counter)

    def hold(self, block_ids: Sequence[int]) -> None:
        self.held.update(block_ids)

    def release(self, block_ids: Sequence[int]) -> None:
        self.held.subtract(block_ids)
        assert min(self.held.values()) >= 0

    @property
    def held_blocks(self) -> int:
        return self.held.total()


class NoEvents:
    def describe(self, request: Any, index: int) -> None: ...

    def publish(self, changes: Sequence[Change]) -> None: ...

    def take(self) -> Iterable[Any]:
        return ()
