"""Looks at every known engine and at the proxy once per tick and reports one FleetObservation, failures
included.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .errors import ObservationError
from .peers import ListedEngine, Peers, ProxyAdmin, ProxyListing
from .records import DOWN, DRAINING, READY, STARTING, EngineObservation, FleetObservation, ProxyObservation
from .tracking import NO_TARGETS, EngineTracker, ProxyTracker, Targets

# An engine that the proxy never saw ready stops counting as supply after this long.
STARTING_PATIENCE_SECONDS = 600.0


@dataclass(frozen=True)
class ObservationFailure:
    """One peer that could not be read at one tick."""

    url: str
    reason: str
    text: str


ANY_ROLE = "*"


class Observer:
    """Keeps one tracker per engine and forgets engines that nobody names any more.

    `owned_role`: what the proxy lists with this role belongs to this pool, beside the named engines and the pool's own
    replicas; ANY_ROLE: whatever it lists; None: nothing else.
    """

    def __init__(
        self,
        engines: tuple[str, ...],
        peers: Peers,
        proxy: ProxyAdmin | None,
        targets: Targets = NO_TARGETS,
        owned_role: str | None = ANY_ROLE,
    ) -> None:
        self._named = engines
        self._targets = targets
        self._owned_role = owned_role
        self._owned: frozenset[str] = frozenset()
        self._peers = peers
        self._proxy = proxy
        self._trackers: dict[str, EngineTracker] = {}
        self._proxy_tracker = ProxyTracker()
        self._listed: dict[str, str] = {}
        self._has_listing = False
        self._starting_since: dict[str, float] = {}

    async def observe(self, now: float, own: Mapping[str, str]) -> tuple[FleetObservation, list[ObservationFailure]]:
        """Look once. `own` maps the URLs of replicas that the planner started to their states."""
        failures: list[ObservationFailure] = []
        seen_proxy = await self._observe_proxy(now, failures)
        # A replica of ours that is on its way in or out is the planner's to judge; else the proxy knows best.
        moving = {url: state for url, state in own.items() if state != READY}
        mine = dict.fromkeys((*self._named, *own), READY)
        listed = {url: state for url, state in self._listed.items() if url in self._owned or url in mine}
        states = mine | listed | moving
        states |= self._given_up(states.keys() - own.keys(), states, now)
        self._trackers = {url: tracker for url, tracker in self._trackers.items() if url in states}
        order = sorted(states)
        engines = await asyncio.gather(*(self._observe_engine(url, states[url], now, failures) for url in order))
        is_complete = self._proxy is None or self._has_listing
        return FleetObservation(now, tuple(engines), seen_proxy, is_complete), failures

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        for url, tracker in self._trackers.items():
            assert tracker.url == url, f"the tracker of {url} watches {tracker.url}"
            tracker.check()
        self._proxy_tracker.check()

    def _given_up(self, foreign: Iterable[str], states: Mapping[str, str], now: float) -> dict[str, str]:
        """Engines of others that are starting for too long; those of ours have a deadline in their life."""
        starting = [url for url in foreign if states[url] == STARTING]
        self._starting_since = {url: self._starting_since.get(url, now) for url in starting}
        late = now - STARTING_PATIENCE_SECONDS
        return {url: DOWN for url, since in self._starting_since.items() if since <= late}

    async def _observe_proxy(self, now: float, failures: list[ObservationFailure]) -> ProxyObservation | None:
        if self._proxy is None:
            return None
        try:
            listing = await self._proxy.engines()
        except ObservationError as error:
            failures.append(ObservationFailure("proxy", error.reason, str(error)))
            return self._proxy_tracker.failed(error)
        self._listed, self._has_listing = _states(listing), True
        self._owned = frozenset(engine.url for engine in listing.engines if self._owned_role in (ANY_ROLE, engine.role))
        in_flight = sum(engine.in_flight for engine in listing.engines)
        totals = listing.arrivals_total, listing.prompt_tokens_total, listing.matched_tokens_total
        return self._proxy_tracker.read(totals, in_flight, now)

    async def _observe_engine(
        self, url: str, state: str, now: float, failures: list[ObservationFailure]
    ) -> EngineObservation:
        if state != READY:  # nothing rests on the numbers of what comes, goes or is away
            return EngineObservation(url, state)
        tracker = self._trackers.setdefault(url, EngineTracker(url, now, targets=self._targets))
        try:
            return tracker.read(await self._peers.scrape(url), now)
        except ObservationError as error:
            failures.append(ObservationFailure(url, error.reason, str(error)))
            return tracker.failed(error, now)


def _states(listing: ProxyListing) -> dict[str, str]:
    return {engine.url: _state(engine) for engine in listing.engines}


def _state(engine: ListedEngine) -> str:
    if engine.state == DOWN and not engine.was_ready:
        return STARTING  # the proxy's patience is for its clients; ours is as long as a large model loads
    return engine.state if engine.state in (STARTING, READY, DRAINING, DOWN) else READY
