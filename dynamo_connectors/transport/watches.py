"""The reader's leases: kept alive while a request waits for its turn, ended when no request wants them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dynamo_connectors.transport.messages import End, Renew
from dynamo_connectors.transport.reader_state import LAST_RESEND_SECONDS, Peer, Send

_RENEW_SECONDS = 5.0
_END_REPEATS = 3
#: How often it is looked whether the last READ of a lease nobody wants any more has ended.
_LOOK_SECONDS = 0.05


@dataclass
class _Watch:
    peer: Peer
    due: float
    ends_left: int = 0


class Watches:
    """What is to be said comes out of `tick`, in the name of `reader`, one of `readers` of each lease."""

    def __init__(self, reader: bytes, readers: int = 1) -> None:
        self._reader, self._readers = reader, readers
        self._watches: dict[bytes, _Watch] = {}

    def watch(self, peer: Peer, lease: bytes, now: float) -> None:
        self._watches.setdefault(lease, _Watch(peer, now))

    def unwatch(self, lease: bytes, now: float) -> None:
        """The owner may have its blocks back, as soon as none of our READs of them is under way."""
        watch = self._watches.get(lease)
        if watch is not None and not watch.ends_left:
            watch.ends_left, watch.due = _END_REPEATS, now

    def peers(self) -> set[Peer]:
        return {watch.peer for watch in self._watches.values()}

    def next_due(self) -> float:
        return min((watch.due for watch in self._watches.values()), default=float("inf"))

    def tick(self, in_use: Iterable[bytes], now: float) -> list[Send]:
        """`in_use`: leases of READs that may still be accepted."""
        said: list[Send] = []
        due = [(lease, watch) for lease, watch in self._watches.items() if now >= watch.due]
        busy = set(in_use) if due else set()
        for lease, watch in due:
            if not watch.ends_left:
                watch.due = now + _RENEW_SECONDS
                said.append(Send(watch.peer, Renew(lease)))
            elif lease in busy:
                watch.due = now + _LOOK_SECONDS
            else:
                # Not answered, so said a few times; what is lost all the same expires.
                watch.due, watch.ends_left = now + LAST_RESEND_SECONDS, watch.ends_left - 1
                said.append(Send(watch.peer, End(self._reader, lease, self._readers)))
                if not watch.ends_left:
                    del self._watches[lease]
        return said

    def check(self) -> None:
        assert all(0 <= watch.ends_left <= _END_REPEATS for watch in self._watches.values()), "an end is said for ever"
