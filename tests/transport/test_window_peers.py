"""Real processes over UCX, one of which reads the other's window: never wrong bytes, and rows that are kept apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from dynamo_connectors.transport.messages import Grant
from tests.transport.peers import DEADLINE_SECONDS, KEYS, ROW_BYTES, ROWS, PeerProcess
from tests.transport.test_peers import Fleet, Keeper, start_owner
from tests.vllm.client import wait_until
from tools.server_process import free_port

#: Rows for one READ of all keys.
WINDOW = {"window_rows": len(KEYS) + 4}


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    """Both sides are this test's own."""
    with ExitStack() as stack:
        port, reader = free_port(), PeerProcess("tcp")
        stack.callback(reader.end)
        options = {"deadline_seconds": DEADLINE_SECONDS, "reads_windows": True}
        reader.call("reader", rows=ROWS, row_bytes=ROW_BYTES, options=options)
        owner = start_owner(port, **WINDOW)
        stack.callback(owner.end)
        fleet = Fleet(reader, Keeper(owner, port), stack)
        fleet.export()
        fleet.read_until_right()
        yield fleet
        wait_until(lambda: reader.call("quarantined") == 0, "the quarantine is over")
        assert reader.call("counts")["nixl_window_blocks|"] >= len(KEYS)
        assert reader.call("close")


def test_late_bytes_of_a_window_find_their_rows_quarantined(fleet: Fleet) -> None:
    fleet.between.at(Grant, status="granted", act=fleet.owner.stop)
    number = fleet.start_read()
    wait_until(lambda: fleet.reader.call("quarantined") == len(KEYS) * ROW_BYTES, "the READ is late", 60.0)
    wait_until(lambda: bool(fleet.reader.call("given_up", read=number)), "nobody has to wait for it")
    assert fleet.reader.call("wait", read=number, seconds=0.1) is None, "its rows are nobody else's yet"
    assert fleet.read() == {"unavailable"}
    fleet.owner.go_on()
    assert fleet.end_read(number) == {"timeout"}
    wait_until(lambda: fleet.reader.call("quarantined") == 0, "the quarantine is over")
    fleet.export()
    fleet.read_until_right()


def test_an_owner_that_is_killed_under_a_read_of_its_window_costs_the_blocks(fleet: Fleet) -> None:
    fleet.between.at(Grant, status="granted", act=fleet.owner.kill)
    assert fleet.read() <= {"disconnected", "timeout", "unreachable"}
    fleet.start_owner(**WINDOW)
    fleet.export()
    fleet.read_until_right()


def test_host_memory_that_is_used_again_under_a_read_of_the_window_costs_nothing(fleet: Fleet) -> None:
    def arm() -> None:
        fleet.owner.call("fill", slot=3, key=KEYS[3])
        fleet.between.at(Grant, status="granted", act=lambda: fleet.owner.call("fill", slot=3, key="another prompt"))

    fleet.read_until("right", before=arm)
    wait_until(lambda: fleet.read() == {"right", "gone"}, "the block that has left is missing alone", 60.0)
