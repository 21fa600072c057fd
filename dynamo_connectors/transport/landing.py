"""Where the words of READs come to: every row that is read into has places of its own for that.

So a READ of words that is late, and may write until it has ended, is in nobody's way: its rows are nobody's either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dynamo_connectors.transport.agent import Numbers, Region

WORD_BYTES = 8


class Landing:
    """Of rows in `regions`, each at least `row_bytes` from the next."""

    def __init__(self, regions: Sequence[Region], row_bytes: int) -> None:
        self._row_bytes = row_bytes
        regions = sorted(regions, key=lambda region: region.address)
        self._starts = np.array([region.address for region in regions], dtype=np.int64)
        rows = [-(-region.num_bytes // row_bytes) for region in regions]
        self._firsts = np.cumsum([0, *rows])
        #: One for each row, and one more for the first row of a READ.
        self._words = np.zeros(2 * max(1, sum(rows)), dtype=np.uint64)

    @property
    def region(self) -> Region:
        return Region(self._words.ctypes.data, self._words.nbytes)

    def places(self, rows: Sequence[int]) -> Numbers:
        """Which words of the landing: one for the READ into the rows at these addresses, and one for each of them."""
        addresses = np.asarray(rows, dtype=np.int64)
        where = np.searchsorted(self._starts, addresses, side="right") - 1
        at = self._firsts[where] + (addresses - self._starts[where]) // self._row_bytes
        places: Numbers = np.concatenate((at[:1] + len(self._words) // 2, at))
        return places

    def addresses(self, places: Numbers) -> Numbers:
        return places * WORD_BYTES + self._words.ctypes.data

    def words(self, places: Numbers) -> list[int]:
        words: list[int] = self._words[places].tolist()
        return words
