"""What survived a restart: a block counts only if every worker has its share of it, under the same slot. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from dynamo_connectors.blocks import BlockKey

#: A slot and the block in it.
Entry: TypeAlias = tuple[int, BlockKey]


class Find(NamedTuple):
    """What `num_workers` workers have in common in one tier, oldest first."""

    num_workers: int
    entries: Sequence[Entry]


#: Tier -> find.
Finds: TypeAlias = Mapping[str, Find]


def in_common(first: Finds, second: Finds) -> dict[str, Find]:
    """The finds of the workers behind both, in the order of the first."""
    both: dict[str, Find] = {**second, **first}
    for tier in first.keys() & second.keys():
        entries = _shared(first[tier].entries, second[tier].entries)
        both[tier] = Find(first[tier].num_workers + second[tier].num_workers, entries)
    return both


def _shared(entries: Iterable[Entry], others: Iterable[Entry]) -> list[Entry]:
    known = set(others)
    return [entry for entry in entries if entry in known]


class Recovery:
    """Collects what workers find. Until all have spoken, nothing may be written over what they may have found."""

    def __init__(self, num_workers: int, tiers: Sequence[str]) -> None:
        self._num_workers = num_workers
        #: Tiers that some workers have not spoken about yet.
        self._open: dict[str, Find | None] = dict.fromkeys(tiers)

    def is_open(self, tier: str) -> bool:
        return tier in self._open

    @property
    def any_open(self) -> bool:
        return bool(self._open)

    def hear(self, finds: Finds) -> dict[str, Sequence[Entry]]:
        """Tier -> what all workers have, for the tiers that the last worker has spoken about now."""
        complete: dict[str, Sequence[Entry]] = {}
        for tier, find in finds.items():
            if tier not in self._open:
                raise AssertionError(f"a worker says twice what it found in {tier}")
            so_far = self._open[tier]
            if so_far is not None:
                find = in_common({tier: so_far}, {tier: find})[tier]
            self._open[tier] = find
            if find.num_workers >= self._num_workers:
                del self._open[tier]
                complete[tier] = find.entries
        return complete

    def check(self) -> None:
        for tier, find in self._open.items():
            assert find is None or find.num_workers < self._num_workers, f"{tier} is complete but still open"
