"""Every event in every state: what the table names happens, what it does not name is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.tiers.block_state import TRANSITIONS, BlockState
from dynamo_connectors.tiers.index import TierIndex

A, B = BlockKey(b"a" * 32), BlockKey(b"b" * 32)


def absent() -> TierIndex:
    return TierIndex(1, erases=True)


def filling() -> TierIndex:
    index = absent()
    assert index.reserve(A) == 0
    return index


def ready() -> TierIndex:
    index = filling()
    assert index.commit(0)
    return index


def leased() -> TierIndex:
    index = ready()
    assert index.pin(A) == 0
    return index


def evicting() -> TierIndex:
    index = ready()
    assert index.evict(1) == 1
    return index


def quarantined_while_filled() -> TierIndex:
    index = filling()
    index.discard(A)
    return index


def quarantined_while_read() -> TierIndex:
    index = leased()
    index.discard(A)
    return index


REFUSED = object()
STATES: dict[Callable[[], TierIndex], BlockState] = {
    absent: BlockState.ABSENT,
    filling: BlockState.FILLING,
    ready: BlockState.READY,
    leased: BlockState.LEASED,
    evicting: BlockState.EVICTING,
    quarantined_while_filled: BlockState.QUARANTINED,
    quarantined_while_read: BlockState.QUARANTINED,
}
#: Each says False, None or 0, or raises, where the state does not allow it.
EVENTS: dict[str, Callable[[TierIndex], object]] = {
    "reserve": lambda index: index.reserve(B) is not None,
    "restore": lambda index: index.restore(0, B),
    "commit": lambda index: index.commit(0) or True,
    "abort": lambda index: index.abort(0) or True,
    "pin": lambda index: index.pin(A) is not None,
    "unpin": lambda index: index.unpin(0) or True,
    "discard": lambda index: index.discard(A) or index.state_of(0) != before[0],
    "evict": lambda index: index.evict(1),
    "erased": lambda index: index.erased(0) or True,
}
before = [BlockState.ABSENT]


@pytest.mark.parametrize("make", STATES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("event", EVENTS)
def test_every_event_in_every_state(make: Callable[[], TierIndex], event: str) -> None:
    index = make()
    before[0] = STATES[make]
    assert index.state_of(0) == STATES[make]
    expected = TRANSITIONS[event].get(STATES[make])
    if make is quarantined_while_read and event in ("commit", "abort"):
        expected = None  # nobody fills it
    if make is quarantined_while_filled and event == "unpin":
        expected = None  # nobody reads it
    if event == "reserve" and make is ready:
        expected = BlockState.EVICTING  # room is made, but it is not there yet
        assert index.reserve(B) is None
    else:
        try:
            happened: object = bool(EVENTS[event](index))
        except AssertionError:
            happened = False
        assert happened == (expected is not None), f"{event} in {STATES[make].name}"
    assert index.state_of(0) == (STATES[make] if expected is None else expected)
    index.check()


def test_every_event_of_the_table_is_tried() -> None:
    assert EVENTS.keys() == TRANSITIONS.keys()


@pytest.mark.parametrize("make", [evicting, quarantined_while_read, quarantined_while_filled])
def test_where_overwriting_erases_nothing_waits_to_be_erased(make: Callable[[], TierIndex]) -> None:
    index = TierIndex(1)
    slot = index.reserve(A)
    assert slot == 0
    if make is quarantined_while_filled:
        index.discard(A)
        assert not index.commit(0)
    else:
        index.commit(0)
        if make is evicting:
            index.evict(1)
        else:
            index.pin(A)
            index.discard(A)
            index.unpin(0)
    assert index.state_of(0) == BlockState.ABSENT
    assert index.take_erasures() == []
    assert index.reserve(A) == 0
