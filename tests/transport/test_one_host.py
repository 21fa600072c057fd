"""READs between processes of one host by UCX's own choice of transport, which is a copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from dynamo_connectors.transport.messages import Done, Grant
from tests.transport.peers import DEADLINE_SECONDS, ROW_BYTES, ROWS, Between, PeerProcess, Reads
from tools.server_process import free_port


class Host(Reads):
    """An owner, a reader, and somebody between them."""

    lease, keys = "ab" * 16, [f"key{number}" for number in range(ROWS)]

    def __init__(self, stack: ExitStack) -> None:
        self.owner_port, self.port = free_port(), free_port()
        self.between = Between(self.port, self.owner_port)
        stack.callback(self.between.close)
        self.reader = PeerProcess()
        stack.callback(self.reader.end)
        self._stack = stack
        self.start_owner()
        self.start_reader()

    def start_owner(self) -> None:
        self.owner = PeerProcess()
        self._stack.callback(self.owner.end)
        assert self.owner.call("owner", rows=ROWS, row_bytes=ROW_BYTES, port=self.owner_port, options={}) is None
        for slot, key in enumerate(self.keys):
            self.owner.call("fill", slot=slot, key=key)
        self.owner.call("export", lease=self.lease, slots={key: slot for slot, key in enumerate(self.keys)})

    def start_reader(self) -> None:
        self.reader.call("reader", rows=ROWS, row_bytes=ROW_BYTES, options={"deadline_seconds": DEADLINE_SECONDS})


@pytest.fixture
def host() -> Iterator[Host]:
    with ExitStack() as stack:
        yield Host(stack)


def test_a_reader_that_ends_while_blocks_are_copied_ends_in_order(host: Host) -> None:
    for _ in range(3):
        host.read_until_right()
        host.start_read(slice(0, ROWS // 2))
        host.start_read(slice(ROWS // 2, ROWS))
        assert host.reader.call("close")
        host.start_reader()
    host.read_until_right()
    assert host.reader.call("close")
    assert host.owner.call("close")


@pytest.mark.parametrize("kind", [Grant, Done])
def test_an_owner_that_is_killed_while_its_blocks_are_copied_costs_them(host: Host, kind: type) -> None:
    host.read_until_right()
    host.between.at(kind, host.owner.kill)
    assert host.read() <= {"disconnected", "timeout", "unreachable", "right"}
    host.between.hook = lambda message: 1
    host.start_owner()
    host.read_until_right()
    assert host.reader.call("quarantined") == 0
    assert host.reader.call("close")
