"""The size of objects and of the object tier."""

from __future__ import annotations

import pytest

from dynamo_connectors.errors import ConfigError
from dynamo_connectors.tiers.chunks import MOST_CHUNKS, capacity_chunks_for, chunk_blocks_for


@pytest.mark.parametrize(
    ("row_bytes", "blocks"),
    [
        (1, 32),
        (64 << 10, 32),
        (256 << 10, 32),
        (500_000, 32),
        (512 << 10, 16),
        (2 << 20, 4),
        (9 << 20, 1),
        (1 << 30, 1),
    ],
)
def test_objects_are_8_to_16_mib_where_rows_allow_it(row_bytes: int, blocks: int) -> None:
    assert chunk_blocks_for(row_bytes) == blocks
    assert chunk_blocks_for(row_bytes) * row_bytes < max(16 << 20, row_bytes + 1)


def test_a_share_too_small_for_one_object_names_the_flag() -> None:
    assert capacity_chunks_for(100, 30) == 3
    with pytest.raises(ConfigError, match="--kvbm-object-gb"):
        capacity_chunks_for(29, 30)


def test_more_objects_than_an_index_holds_are_refused_before_memory_runs_out() -> None:
    assert capacity_chunks_for(30 * MOST_CHUNKS, 30) == MOST_CHUNKS
    with pytest.raises(ConfigError, match="lower --kvbm-object-gb"):
        capacity_chunks_for(10**21, 30)
