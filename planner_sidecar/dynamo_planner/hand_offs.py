"""Whether peers may still read KV from an engine that has no request in flight any more."""

from __future__ import annotations

from collections.abc import Callable

from .errors import ObservationError
from .exposition import EngineReading
from .peers import Peers


class HandOffs:
    """Asked again and again while an engine is drained. Its word is believed for `limit_seconds` from the first time it
    was asked: no lease that nobody renews is longer, and the number may stand still on an engine that does nothing.
    """

    def __init__(self, peers: Peers, clock: Callable[[], float], limit_seconds: float) -> None:
        self._peers = peers
        self._clock = clock
        self._limit_seconds = limit_seconds
        self._since: dict[str, float] = {}

    async def are_over(self, url: str) -> bool:
        """A reading that fails says nothing about leases: the limit ends the wait for an engine that cannot be read."""
        if self._is_time_up(url):
            return True
        try:
            return (await self._peers.scrape(url)).open_leases == 0
        except ObservationError:
            return False

    def are_over_in(self, url: str, reading: EngineReading) -> bool:
        """The same from a reading that the caller has."""
        return self._is_time_up(url) or reading.open_leases == 0

    def _is_time_up(self, url: str) -> bool:
        now = self._clock()
        return now - self._since.setdefault(url, now) >= self._limit_seconds
