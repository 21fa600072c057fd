"""How far a prefix can be used when several pools must hold their part of it. Pure.

A hybrid model keeps its cache in several pools. Some need every page of a prefix (a sparse-attention indexer), others
only the last ones (a sliding window, a Mamba state), so a shorter prefix may be usable where a longer one is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PoolNeed:
    """What one pool holds: `present[i]` for page i. `last_pages` of a prefix must be there; None asks for all."""

    name: str
    present: Sequence[bool]
    last_pages: int | None = None


@dataclass(frozen=True)
class PoolMatch:
    """`lengths`: every usable length of the prefix, in pages, shortest first. `reach`: how far each pool alone goes."""

    lengths: tuple[int, ...]
    reach: dict[str, int]

    @property
    def pages(self) -> int:
        return self.lengths[-1] if self.lengths else 0


def match_pools(main: str, main_pages: int, needs: Sequence[PoolNeed]) -> PoolMatch:
    """`main_pages` leading pages lie in the pool `main`; nothing behind them counts."""
    usable = set(range(1, main_pages + 1))
    reach = {main: main_pages}
    for need in needs:
        fits = _lengths(need.present[:main_pages], need.last_pages)
        reach[need.name] = max(fits, default=0)
        usable &= fits
    return PoolMatch(tuple(sorted(usable)), {name: pages for name, pages in reach.items() if pages})


def _lengths(present: Sequence[bool], last_pages: int | None) -> set[int]:
    lengths: set[int] = set()
    run = 0
    for count, is_here in enumerate(present, 1):
        run = run + 1 if is_here else 0
        if run >= (count if last_pages is None else min(max(last_pages, 1), count)):
            lengths.add(count)
    return lengths
