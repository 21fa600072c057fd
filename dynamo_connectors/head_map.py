"""Where the KV heads of a rank lie in the rows of an engine with another tensor parallelism. Pure.

Both engines divide the same heads evenly among their ranks, in order. A page keeps them one behind the other, once or
more (all keys, then all values), so what two ranks have in common of a page is one range of bytes for each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple


class HeadPage(NamedTuple):
    """One layer's page within a row: from `offset` on, `times` times the `heads` of the rank."""

    offset: int
    times: int
    heads: int
    head_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.times * self.heads * self.head_bytes

    def divided(self, ranks: int, among: int) -> HeadPage:
        """The same page of an engine with `among` ranks instead of `ranks`."""
        return self._replace(offset=self.offset * ranks // among, heads=self.heads * ranks // among)


class Piece(NamedTuple):
    """Bytes of a row: where they begin in the peer's, and here."""

    there: int
    here: int
    num_bytes: int


class Part(NamedTuple):
    """What one rank of a peer holds of this rank's rows."""

    rank: int
    #: Of the peer's rows.
    row_bytes: int
    pieces: tuple[Piece, ...]
    #: How many of this engine's ranks read that one.
    readers: int


class Heads(NamedTuple):
    """Rows that consist of nothing but the pages of a rank's heads. `what`: all that a page is beside their number."""

    pages: tuple[HeadPage, ...]
    what: str

    def fingerprint(self, ranks: int) -> str:
        """Equal for engines that differ in nothing but how many ranks they divide the heads among."""
        whole = [page.divided(ranks, 1) for page in self.pages]
        return hashlib.blake2b(repr((self.what, whole)).encode(), digest_size=8).hexdigest()

    def parts(self, rank: int, ranks: int, among: int) -> list[Part]:
        """Where the rows of `rank` of `ranks` lie at a peer with `among` ranks; nowhere, if that cannot have them."""
        if any(page.heads * ranks % among for page in self.pages):
            return []
        pages = sorted(set(self.pages))
        row_bytes = sum(page.divided(ranks, among).num_bytes for page in pages)
        return [
            Part(peer, row_bytes, _pieces(pages, (rank, ranks), (peer, among)), _readers(peer, among, ranks))
            for peer in range(rank * among // ranks, -(-(rank + 1) * among // ranks))
        ]


def _readers(peer: int, among: int, ranks: int) -> int:
    return -(-(peer + 1) * ranks // among) - peer * ranks // among


def _pieces(pages: Sequence[HeadPage], mine: tuple[int, int], theirs: tuple[int, int]) -> tuple[Piece, ...]:
    """What two ranks have in common; each is (rank, ranks)."""
    pieces: list[Piece] = []
    for page in pages:
        other = page.divided(mine[1], theirs[1])
        first_here, first_there = mine[0] * page.heads, theirs[0] * other.heads
        start = max(first_here, first_there)
        stop = min(first_here + page.heads, first_there + other.heads)
        for time in range(page.times):
            there = other.offset + (time * other.heads + start - first_there) * page.head_bytes
            here = page.offset + (time * page.heads + start - first_here) * page.head_bytes
            pieces.append(Piece(there, here, (stop - start) * page.head_bytes))
    return tuple(pieces)
