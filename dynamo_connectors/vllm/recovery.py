"""What survived a restart: a block counts only if every worker has its share of it, under the same slot. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from dynamo_connectors.blocks import BlockKey

#: A slot and the block in it.
Entry: TypeAlias = tuple[int, BlockKey]
#: Tier -> what one worker found there, oldest first.
Found: TypeAlias = Mapping[str, Sequence[Entry]]


def in_common(first: Found, second: Found) -> dict[str, list[Entry]]:
    """What both have, in the order of the first."""
    return {tier: _shared(entries, second.get(tier, ())) for tier, entries in first.items()}


def _shared(entries: Iterable[Entry], others: Iterable[Entry]) -> list[Entry]:
    known = set(others)
    return [entry for entry in entries if entry in known]


class Recovery:
    """Collects the workers' reports. Until all have spoken, nothing may be written where they may have found blocks."""

    def __init__(self, num_workers: int, tiers: Sequence[str]) -> None:
        self._workers_left = num_workers if tiers else 0
        self._found: Found | None = None

    @property
    def is_complete(self) -> bool:
        return self._workers_left == 0

    def hear(self, found: Found, num_workers: int) -> Found | None:
        """Takes the common finds of `num_workers` more workers; the finds of all, once, when the last has spoken."""
        if num_workers == 0:
            return None
        if num_workers > self._workers_left:
            raise AssertionError(f"{num_workers} workers report what they found, {self._workers_left} were expected")
        self._found = found if self._found is None else in_common(self._found, found)
        self._workers_left -= num_workers
        return self._found if self.is_complete else None
