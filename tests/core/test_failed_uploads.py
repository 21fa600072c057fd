"""Uploads that failed and may have left an object: it is erased, as far as the store still erases anything."""

from __future__ import annotations

import pytest

from dynamo_connectors.cascade import jobs_of
from tests.core.test_cascade import CHAIN, STORE, in_tier, request, with_store


@pytest.mark.parametrize("is_reset", [False, True])
def test_what_a_failed_upload_may_have_left_is_erased(is_reset: bool) -> None:
    """Another worker may have stored its part; a store may have taken what it never confirmed."""
    manager = with_store(chunks=64, dram=32)
    request(manager, CHAIN[:6])
    manager.offload(CHAIN[:6])
    first, second = jobs_of(manager.take_moves())
    if is_reset:
        manager.clear()
    for move in first:
        manager.end_move(move, ok=False, sent=move.row == 1)
    for move in second:
        manager.end_move(move, ok=False)
    manager.check()
    (erasure,) = manager.take_erasures()
    assert erasure.key == CHAIN[2]
    assert manager.stats()[STORE].evicting_blocks == 3
    request(manager, CHAIN[:6])
    manager.offload(CHAIN[:6])
    assert {move.chunk for move in manager.take_moves()} == {CHAIN[5]}, "what is being erased is not written again"
    manager.end_erasure(erasure)
    manager.check()
    assert in_tier(manager, STORE) == []


def test_a_store_that_erases_nothing_does_not_fill_up_with_what_failed() -> None:
    manager = with_store(chunk_blocks=2, chunks=64, dram=64)
    request(manager, CHAIN)
    manager.offload(CHAIN)
    for move in manager.take_moves():
        manager.end_move(move, ok=False, sent=True)
    manager.check()
    assert manager.stats()[STORE].evicting_blocks == 2 * 2
    assert manager.stats()[STORE].filling_blocks == 0
