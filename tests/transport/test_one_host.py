"""READs between processes of one host by UCX's own choice of transport, which is a copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from dynamo_connectors.transport.messages import Done, Grant, Reply, Request
from tests.transport.peers import ROW_BYTES, ROWS, Between, PeerProcess
from tests.vllm.client import wait_until
from tools.server_process import free_port

KEYS = [f"key{number}" for number in range(ROWS)]
LEASE = "ab" * 16


class Host:
    """An owner, a reader, and somebody between them."""

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
        for slot, key in enumerate(KEYS):
            self.owner.call("fill", slot=slot, key=key)
        self.owner.call("export", lease=LEASE, slots={key: slot for slot, key in enumerate(KEYS)})

    def start_reader(self) -> None:
        self.reader.call("reader", rows=ROWS, row_bytes=ROW_BYTES, options={"deadline_seconds": 5.0})

    def start_read(self, blocks: slice = slice(None)) -> int:
        keys, rows = KEYS[blocks], list(range(ROWS))[blocks]
        number: int = self.reader.call("read", port=self.port, lease=LEASE, keys=keys, rows=rows)
        return number

    def end_read(self, number: int) -> set[str]:
        said = self.reader.call("wait", read=number)
        assert said is not None, "the read did not end"
        assert "WRONG" not in said
        return set(said)

    def read_until_right(self) -> None:
        wait_until(lambda: self.end_read(self.start_read()) == {"right"}, "the blocks arrive", 60.0)


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

    def kill(message: Request | Reply) -> int:
        if isinstance(message, kind):
            host.owner.kill()
        return 1

    host.between.hook = kill
    expected = {"disconnected", "timeout", "unreachable", "right"}
    assert host.end_read(host.start_read()) <= expected
    host.between.hook = lambda message: 1
    host.start_owner()
    host.read_until_right()
    assert host.reader.call("quarantined") == 0
    assert host.reader.call("close")
