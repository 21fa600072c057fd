"""Which engine a session went to last: a bounded memory with a time to live. The clock is an argument."""

from __future__ import annotations

from collections import OrderedDict

_MAX_SESSIONS = 100_000


class Sessions:
    """Session name -> (slot, when it is forgotten), the longest unused first."""

    def __init__(self, ttl_seconds: float, max_sessions: int = _MAX_SESSIONS) -> None:
        self.ttl_seconds = ttl_seconds
        self._max = max_sessions
        self._slots: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, session: str, now: float) -> int | None:
        """Where the session lives, if it still does."""
        known = self._slots.get(session)
        if known is None or known[1] <= now:
            return None
        return known[0]

    def placed(self, session: str, slot: int, now: float) -> None:
        """A request of the session went to an engine."""
        self._slots[session] = slot, now + self.ttl_seconds
        self._slots.move_to_end(session)
        while self._slots and (len(self._slots) > self._max or next(iter(self._slots.values()))[1] <= now):
            self._slots.popitem(last=False)

    def forget_slot(self, slot: int) -> None:
        """An engine left."""
        for session in [session for session, known in self._slots.items() if known[0] == slot]:
            del self._slots[session]

    def check(self) -> None:
        assert len(self._slots) <= self._max, f"{len(self._slots)} sessions of {self._max}"
        ends = [end for _, end in self._slots.values()]
        assert ends == sorted(ends), "a session that was used later is forgotten sooner"
