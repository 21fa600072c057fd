"""The network between two real processes is cut and joined again: no wrong bytes, always an end, nothing kept."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.transport.network import Cable
from tests.transport.peers import ROW_BYTES, ROWS, PeerProcess
from tests.vllm.client import wait_until
from tools.server_process import free_port

KEYS = [f"key{number}" for number in range(16)]
LEASE = "ab" * 16
#: What a reader may say while it cannot reach the owner.
CUT_OFF = {"timeout", "unreachable", "unavailable", "disconnected"}


class Far:
    """An owner on one host, a reader on the other."""

    def __init__(self, cable: Cable) -> None:
        self.cable, self.port = cable, free_port()
        self.owner = PeerProcess("tcp", cable.inside(0))
        options = {"host": cable.hosts[0], "lease_seconds": 600.0}
        try:
            answer = self.owner.call("owner", rows=ROWS, row_bytes=ROW_BYTES, port=self.port, options=options)
            assert answer is None, answer
            for slot, key in enumerate(KEYS):
                self.owner.call("fill", slot=slot, key=key)
            self.owner.call("export", lease=LEASE, slots={key: slot for slot, key in enumerate(KEYS)})
            self.reader = PeerProcess("tcp", cable.inside(1))
        except BaseException:
            self.owner.end()
            raise
        self.reader.call("reader", rows=ROWS, row_bytes=ROW_BYTES, options={"deadline_seconds": 5.0})

    def start(self, first_row: int = 0) -> int:
        rows = list(range(first_row, first_row + len(KEYS)))
        where = {"host": self.cable.hosts[0], "port": self.port, "lease": LEASE}
        number: int = self.reader.call("read", **where, keys=KEYS, rows=rows)
        return number

    def end(self, number: int) -> set[str]:
        """Whoever waits has been told by now; what is said when nothing touches the rows any more."""
        said = self.reader.call("wait", read=number, seconds=150.0)
        assert said is not None, "the read did not end"
        assert "WRONG" not in said
        return set(said)

    def is_right(self) -> bool:
        return self.end(self.start()) == {"right"}

    def close(self) -> None:
        try:
            assert self.reader.call("close")
            assert self.owner.call("close")
        finally:
            self.reader.end()
            self.owner.end()


@pytest.fixture
def far() -> Iterator[Far]:
    try:
        cable = Cable()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine gives no network namespaces: {error}")
    try:
        far = Far(cable)
        try:
            yield far
        finally:
            far.close()
    finally:
        cable.close()


@pytest.mark.parametrize("seconds", [1.0, 10.0, 60.0])
def test_a_network_that_is_cut_costs_its_reads_and_nothing_else(far: Far, seconds: float) -> None:
    wait_until(far.is_right, "the blocks arrive", 60.0)
    under_way = far.start(len(KEYS))  # asked for, granted, read or checked when the cable goes
    far.cable.cut()
    joined_at = time.monotonic() + seconds
    while True:
        assert far.end(far.start()) <= CUT_OFF
        if time.monotonic() > joined_at:
            break
        time.sleep(0.1)
    far.cable.join()
    assert far.end(under_way) <= CUT_OFF | {"right"}
    wait_until(far.is_right, "the blocks arrive again", 120.0)
    wait_until(lambda: far.reader.call("quarantined") == 0, "nothing is quarantined", 120.0)
