"""One side of a transfer in a process of its own: obeys one JSON object per line, and answers each with one.

Every block's row follows from its key, so a reader knows what it should have got.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import DynamoConnectorsError, StoreError
from dynamo_connectors.hbm_rows import HbmRows
from dynamo_connectors.head_map import Piece
from dynamo_connectors.tiers.base import Place
from dynamo_connectors.tiers.dram import DramStore
from dynamo_connectors.transport import messages
from dynamo_connectors.transport.agent import Region
from dynamo_connectors.transport.divided_peers import DividedPeerTier
from dynamo_connectors.transport.peer_tier import PeerSettings
from dynamo_connectors.transport.server import PeerServer, ServerSettings, host_rows
from dynamo_connectors.transport.tickets import Ticket
from dynamo_connectors.window import Window

CPU = torch.device("cpu")


@functools.lru_cache(maxsize=256)
def row_of(key: bytes, row_bytes: int) -> npt.NDArray[np.uint8]:
    digest = np.frombuffer(hashlib.blake2b(key).digest(), dtype=np.uint8)
    return np.resize(digest, row_bytes)


def key_on(rank: int, key: str) -> bytes:
    """What a rank has of a block follows from this."""
    return f"{key}/{rank}".encode() if rank else key.encode()


class OwnerSide:
    def __init__(self, rows: int, row_bytes: int, port: int, options: dict[str, Any]) -> None:
        self.dram = DramStore(rows, row_bytes)
        self.rank = options.get("rank", 0)
        messages.VERSION = options.get("version", messages.VERSION)
        settings = ServerSettings(
            options.get("host", "127.0.0.1"),
            port,
            options.get("namespace", "n").encode(),
            options.get("secret", "s").encode(),
            options.get("lease_seconds", 30.0),
            opens_shelf=True,
        )
        window_rows = options.get("window_rows", 0)
        window = Window(self.dram, HbmRows(window_rows, row_bytes, CPU)) if window_rows else None
        self.server = PeerServer(settings, host_rows(self.dram, window))
        if options.get("truncates"):
            offer = self.server._owner._offer
            self.server._owner._offer = offer._replace(metadata=offer.metadata[: len(offer.metadata) // 2])

    def fill(self, slot: int, key: str) -> None:
        row = row_of(key_on(self.rank, key), self.dram.row_bytes)
        self.dram.write(slot, BlockKey(key.encode()), memoryview(row))

    def announce(self, lease: str) -> None:
        self.server.announce(bytes.fromhex(lease))

    def export(self, lease: str, slots: dict[str, int]) -> None:
        self.server.export(bytes.fromhex(lease), {BlockKey(key.encode()): slot for key, slot in slots.items()})

    def ended(self) -> list[str]:
        return [lease.hex() for lease in self.server.take_ended()]

    def open_leases(self) -> int:
        return self.server.open_leases

    def counts(self) -> dict[str, int]:
        return {"|".join(key): number for key, number in self.server.take_counts().items()}

    def fail_once(self) -> None:
        """What it does from time to time fails, for a reason that nobody thought of."""
        expire, owner = self.server._owner.expire, self.server._owner

        def fail(now: float) -> None:
            owner.expire = expire  # type: ignore[method-assign]
            raise OSError("nobody thought of it")

        owner.expire = fail  # type: ignore[method-assign]

    def close(self) -> bool:
        return self.server.close()


class ReaderSide:
    """Reads into the rows of its slab, or, with the option `reads_windows`, into rows beside it.

    With `ranks` each of so many owners at neighbouring ports has its part of each row, one behind the other.
    """

    def __init__(self, rows: int, row_bytes: int, options: dict[str, Any]) -> None:
        self.dram = DramStore(rows, row_bytes)
        self.ranks = options.get("ranks", 1)
        self.rows, self.reads_windows = self.dram.rows, options.get("reads_windows", False)
        regions = [Region(self.dram.rows.ctypes.data, self.dram.rows.nbytes)]
        if self.reads_windows:
            self.hbm = HbmRows(rows, row_bytes, CPU)
            self.rows = self.hbm.rows.numpy()
            regions.append(self.hbm.region)
        settings = PeerSettings(
            0,
            options.get("namespace", "n").encode(),
            row_bytes,
            options.get("secret", "s").encode(),
            options.get("deadline_seconds", 10.0),
            *[options.get("quarantine_bytes", 1 << 30)] * 2,
        )
        self.tier = DividedPeerTier(settings, regions, partial(self.divided, settings))
        self.reads: list[tuple[list[str], list[int], Future[Sequence[StoreError | None]]]] = []
        self.signals: list[Future[str] | None] = []

    @staticmethod
    def divided(settings: PeerSettings, ranks: int) -> list[PeerSettings]:
        part = settings.row_bytes // ranks
        pieces = [Piece(0, rank * part, part) for rank in range(ranks)]
        return [replace(settings, rank=rank, row_bytes=part, parts=(piece,)) for rank, piece in enumerate(pieces)]

    def ticket(self, port: int, lease: str, host: str = "127.0.0.1") -> Ticket:
        return Ticket(host, port, bytes.fromhex(lease), self.ranks)

    def right_row(self, key: str) -> npt.NDArray[np.uint8]:
        part = self.dram.row_bytes // self.ranks
        return np.concatenate([row_of(key_on(rank, key), part) for rank in range(self.ranks)])

    def read(self, port: int, lease: str, keys: list[str], rows: list[int], host: str = "127.0.0.1") -> int:
        ticket = BlockKey(self.ticket(port, lease, host).encode())
        places = [Place(BlockKey(key.encode()), 0, ticket) for key in keys]
        for row in rows:
            self.rows[row] = 0
        if self.reads_windows:
            (batch,) = self.tier.read_windows(places, [self.hbm.buffer(row) for row in rows])
        else:
            (batch,) = self.tier.read(places, [self.dram.buffer(row) for row in rows])
        self.reads.append((keys, rows, batch.outcome))
        self.signals.append(batch.given_up)
        return len(self.reads) - 1

    def wait(self, read: int, seconds: float = 60.0) -> list[str] | None:
        """For each block why it is missing, or `right`, or `WRONG`; None when the read is still under way."""
        keys, rows, outcome = self.reads[read]
        deadline = time.monotonic() + seconds
        while not outcome.done():
            if time.monotonic() > deadline:
                return None
            time.sleep(0.005)
        said = []
        for key, row, error in zip(keys, rows, outcome.result(), strict=True):
            right = np.array_equal(self.rows[row], self.right_row(key))
            said.append(error.reason if error is not None else "right" if right else "WRONG")
        return said

    def hold_words(self) -> None:
        """The next READ of words is not started before `free_words`."""
        plane, self.held, self.freed = self.tier._plane, threading.Event(), threading.Event()
        post_words = plane.post_words

        def hold(*what: Any) -> str | None:
            plane.post_words = post_words  # type: ignore[method-assign]
            self.held.set()
            assert self.freed.wait(60)
            return post_words(*what)

        plane.post_words = hold  # type: ignore[method-assign]

    def await_words(self) -> bool:
        """All rows of the READ are here."""
        return self.held.wait(60)

    def free_words(self) -> None:
        self.freed.set()

    def given_up(self, read: int) -> bool:
        signal = self.signals[read]
        return signal is not None and signal.done()

    def scribble(self, rows: list[int]) -> None:
        """These rows belong to somebody else now."""
        for row in rows:
            self.rows[row] = 7

    def scribbled(self, rows: list[int]) -> bool:
        return all(bool((self.rows[row] == 7).all()) for row in rows)

    def watch(self, port: int, lease: str, wanted: bool) -> None:
        ticket = self.ticket(port, lease)
        (self.tier.watch if wanted else self.tier.unwatch)(ticket)

    def quarantined(self) -> int:
        return self.tier.quarantined_bytes

    def counts(self) -> dict[str, int]:
        return {"|".join(key): number for key, number in self.tier.take_counts().items()}

    def close(self) -> bool:
        return self.tier.close(time.monotonic() + 60)

    def fail(self) -> None:
        """Its thread dies of something that nobody thought of."""
        self.tier._reader.tick = None  # type: ignore[assignment,method-assign]
        self.tier._sockets.wake()
        self.tier._thread.join(30)


def main() -> None:
    side: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        what = asked.pop("do")
        make: dict[str, Callable[..., Any]] = {"owner": OwnerSide, "reader": ReaderSide}
        try:
            if what in make:
                side, answer = make[what](**asked), None
            else:
                answer = getattr(side, what)(**asked)
        except DynamoConnectorsError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
