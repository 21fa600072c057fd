"""Real processes over UCX: two ranks that each hold a part of every block, and a reader who needs both of them."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from dynamo_connectors.transport.messages import Grant, Hello
from tests.transport.peers import DEADLINE_SECONDS, KEYS, ROW_BYTES, ROWS, SLOW, Between, PeerProcess, Reads
from tests.transport.test_peers import Keeper
from tests.vllm.client import wait_until
from tools.server_process import free_port

RANKS = 2
#: What a rank that is lost costs.
LOST = SLOW | {"disconnected", "restarted", "refused", "gone"}


def start(rank: int, port: int) -> PeerProcess:
    owner = PeerProcess("tcp")
    answer = owner.call("owner", rows=ROWS, row_bytes=ROW_BYTES // RANKS, port=port, options={"rank": rank})
    assert answer is None, answer
    for slot, key in enumerate(KEYS):
        owner.call("fill", slot=slot + rank, key=key)  # where the other rank has another block
    return owner


class Ranks(Reads):
    """Of a prefill engine, their reader, and somebody between them."""

    def __init__(self, reader: PeerProcess, keepers: list[Keeper], stack: ExitStack) -> None:
        self.reader, self._stack = reader, stack
        self.owners = [keeper.process for keeper in keepers]
        self._connect([keeper.port for keeper in keepers])

    def _connect(self, ports: list[int]) -> None:
        self._ports, self.port = ports, free_port(RANKS)
        self.between = [Between(self.port + rank, port) for rank, port in enumerate(ports)]
        for each in self.between:
            self._stack.callback(each.close)

    def replace_last(self) -> None:
        """By one that this test may lose, or by its next run at the same address."""
        if not self._is_own:
            self._is_own = True
            self._connect([*self._ports[:-1], free_port()])
        self.owners = [*self.owners[:-1], start(RANKS - 1, self._ports[-1])]
        self._stack.callback(self.owners[-1].end)

    _is_own = False

    def export(self, *ranks: int) -> None:
        """A new lease, of which these ranks have heard."""
        self.lease = secrets.token_hex(16)
        for rank in ranks or range(RANKS):
            slots = {key: slot + rank for slot, key in enumerate(KEYS)}
            self.owners[rank].call("export", lease=self.lease, slots=slots)


@pytest.fixture(scope="module")
def reader() -> Iterator[PeerProcess]:
    process = PeerProcess("tcp")
    try:
        options = {"deadline_seconds": DEADLINE_SECONDS, "ranks": RANKS}
        process.call("reader", rows=ROWS, row_bytes=ROW_BYTES, options=options)
        yield process
        assert process.call("close")
    finally:
        process.end()


@pytest.fixture(scope="module")
def keepers() -> Iterator[list[Keeper]]:
    with ExitStack() as stack:
        keepers = []
        for rank in range(RANKS):
            port = free_port()
            keepers.append(Keeper(start(rank, port), port))
            stack.callback(keepers[-1].process.end)
        yield keepers
        for keeper in keepers:
            assert keeper.process.call("close")


@pytest.fixture
def ranks(reader: PeerProcess, keepers: list[Keeper]) -> Iterator[Ranks]:
    with ExitStack() as stack:
        for keeper in keepers:
            stack.callback(keeper.process.go_on)  # a test that failed may have left it stopped
        ranks = Ranks(reader, keepers, stack)
        ranks.export()
        ranks.read_until("right")
        yield ranks
        wait_until(lambda: reader.call("quarantined") == 0, "the quarantine is over")


def test_a_block_comes_from_both_and_both_have_it_back(ranks: Ranks) -> None:
    ranks.leave()
    for owner in ranks.owners:
        wait_until(lambda owner=owner: ranks.lease in owner.call("ended"), "the rank has its blocks back")  # type: ignore[misc]


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_block_that_one_rank_has_given_away_is_missed(ranks: Ranks, rank: int) -> None:
    slot = 3 + rank

    def arm() -> None:
        ranks.owners[rank].call("fill", slot=slot, key=KEYS[3])
        ranks.between[rank].at(Grant, lambda: ranks.owners[rank].call("fill", slot=slot, key="another prompt"))

    def heard() -> bool:
        arm()
        said = ranks.read()
        assert said <= SLOW | {"stale", "right"}
        return "stale" in said

    wait_until(heard, "the block is stale", 60.0)
    ranks.owners[rank].call("fill", slot=slot, key=KEYS[3])


def test_a_lease_that_one_rank_has_never_heard_of_is_missed(ranks: Ranks) -> None:
    ranks.export(0)
    ranks.read_until("gone")


def test_a_rank_that_is_killed_costs_the_blocks_and_its_next_run_serves(ranks: Ranks) -> None:
    """As it is met, and as it is read."""
    ranks.replace_last()
    for kind in (Hello, Grant):
        ranks.export()
        ranks.between[RANKS - 1].at(kind, ranks.owners[-1].kill)
        assert ranks.read() <= LOST
        ranks.leave()
        wait_until(lambda: ranks.lease in ranks.owners[0].call("ended"), "the other rank has its blocks back")
        ranks.replace_last()
        assert ranks.read() <= LOST, "there is nothing of that lease"
        ranks.export()
        ranks.read_until("right", may_say=LOST)


def test_rows_are_nobodys_until_the_last_rank_is_done_with_them(ranks: Ranks) -> None:
    ranks.between[1].at(Grant, ranks.owners[1].stop)
    number = ranks.start_read()
    wait_until(lambda: bool(ranks.reader.call("given_up", read=number)), "nobody has to wait for it")
    assert ranks.reader.call("wait", read=number, seconds=0.1) is None, "late bytes may still come"
    assert ranks.reader.call("quarantined") >= len(KEYS) * ROW_BYTES // RANKS
    ranks.owners[1].go_on()
    assert ranks.end_read(number) == {"timeout"}
    ranks.read_until("right")
