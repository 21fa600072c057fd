"""Whether peers may still read KV from an engine that has no request in flight any more."""

from __future__ import annotations

from collections.abc import Callable

from .errors import ObservationError
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
        """What cannot be read is not waited for: the proxy's count has said that nothing is in flight."""
        now = self._clock()
        if now - self._since.setdefault(url, now) >= self._limit_seconds:
            return True
        try:
            return (await self._peers.scrape(url)).open_leases == 0
        except ObservationError:
            return True
