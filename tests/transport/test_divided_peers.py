"""A block whose parts are read from several ranks: it ends with the last of them, and is missed with any."""

from __future__ import annotations

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import StoreError
from dynamo_connectors.transport.divided_peers import _Together
from dynamo_connectors.transport.peer_tier import Call

KEYS = [BlockKey(b"a"), BlockKey(b"b")]


def joined() -> tuple[Call, Call, Call]:
    call, *parts = (Call(KEYS, [0, 8]) for _ in range(3))
    _Together(call, parts)
    return call, parts[0], parts[1]


def test_a_block_counts_when_every_part_has_come() -> None:
    call, one, other = joined()
    one.outcome.set_result([None, None])
    assert not call.outcome.done(), "its buffers are in use"
    stale = StoreError("stale", "")
    other.outcome.set_result([None, stale])
    assert list(call.outcome.result()) == [None, stale]
    assert not call.given_up.done()


def test_nobody_waits_for_the_rest_of_a_block_that_will_not_come_whole() -> None:
    call, one, other = joined()
    other.given_up.set_result("unreachable")
    one.given_up.set_result("unavailable")
    assert call.given_up.result() == "unreachable"
    assert not call.outcome.done(), "late bytes may still come"
    for part in (one, other):
        part.end("timeout", "")
    assert [error.reason for error in call.outcome.result() if error] == ["timeout", "timeout"]
