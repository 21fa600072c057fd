"""Which engine a session went to last: a bounded memory with a time to live. The clock is an argument.

Proxies before one fleet tell each other where they placed sessions (replicas.py), by number: a session's name is its
client's business.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

_MAX_SESSIONS = 100_000
_MAX_NEWS = 1_000  # that nobody has asked for yet


def number_of(session: str) -> int:
    """How proxies call a session when they talk."""
    return int.from_bytes(blake2b(session.encode(errors="replace"), digest_size=8).digest(), "big")


class Sessions:
    """Session -> (slot, when it is forgotten), the longest unused first."""

    def __init__(self, ttl_seconds: float, max_sessions: int = _MAX_SESSIONS) -> None:
        self.ttl_seconds = ttl_seconds
        self._max = max_sessions
        self._slots: OrderedDict[int, tuple[int, float]] = OrderedDict()
        self._news: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, number: int, now: float) -> int | None:
        """Where the session lives, if it still does."""
        known = self._slots.get(number)
        if known is None or known[1] <= now:
            return None
        return known[0]

    def placed(self, number: int, slot: int, now: float) -> None:
        """A request of the session went to an engine."""
        self.told(number, slot, now)
        if len(self._news) < _MAX_NEWS:
            self._news[number] = slot

    def told(self, number: int, slot: int, now: float) -> None:
        """Another proxy placed it."""
        self._slots[number] = slot, now + self.ttl_seconds
        self._slots.move_to_end(number)
        while self._slots and (len(self._slots) > self._max or next(iter(self._slots.values()))[1] <= now):
            self._slots.popitem(last=False)

    def take_news(self) -> dict[int, int]:
        """Session -> slot, of those placed here since the last time."""
        news, self._news = self._news, {}
        return news

    def forget_slot(self, slot: int) -> None:
        """An engine left."""
        for number in [number for number, known in self._slots.items() if known[0] == slot]:
            del self._slots[number]
        self._news = {number: told for number, told in self._news.items() if told != slot}

    def check(self) -> None:
        assert len(self._slots) <= self._max, f"{len(self._slots)} sessions of {self._max}"
        assert len(self._news) <= _MAX_NEWS, f"{len(self._news)} sessions to tell of"
        ends = [end for _, end in self._slots.values()]
        assert ends == sorted(ends), "a session that was used later is forgotten sooner"
