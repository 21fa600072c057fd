"""Leases on the KV of an engine on its way out: waited for, with a proxy or without, and never for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import pytest
from dynamo_planner.drained_stop import DrainedStop
from dynamo_planner.hand_offs import HandOffs
from dynamo_planner.peers import Peers, ProxyAdmin
from dynamo_planner.replica import Limits, Surroundings

from tests.planner.planner_fakes import FakeEngine, FakeProxy, served, vllm_text

IDLE = vllm_text(running=0, kv=0.0)
LEASED = IDLE + 'dynamo_nixl_open_leases{engine="0"} 2.0\n'


@dataclass
class Story:
    """A drained stop of one engine. `seconds` is its clock, which its sleeps move; `turns` happen at their second."""

    engine: FakeEngine
    around: Surroundings
    url: str
    seconds: list[float]
    turns: dict[float, tuple[str, str]] = field(default_factory=dict)
    ordered_at: float | None = None

    async def mark(self, urls: Sequence[str]) -> None:
        assert list(urls) == [self.url]

    async def unmark(self, urls: Sequence[str]) -> None:
        assert self.ordered_at is None

    async def stop(self, urls: Sequence[str]) -> None:
        self.ordered_at = self.seconds[0]

    async def left(self, urls: Sequence[str]) -> tuple[frozenset[str], bool]:
        return frozenset(), True

    async def sleep(self, seconds: float) -> None:
        self.seconds[0] += seconds
        self.engine.text, self.engine.mood = self.turns.get(self.seconds[0], (self.engine.text, self.engine.mood))

    async def outcome(self) -> str:
        (end,) = await DrainedStop((self.url,), self, self.around).run()
        return end.reason or end.what


@asynccontextmanager
async def story_of(listing: str, limits: Limits) -> AsyncIterator[Story]:
    """`listing`: whether there is a proxy that lists the engine, one that does not, or none."""
    engine, proxy, seconds = FakeEngine(LEASED), FakeProxy(), [0.0]
    made: Story

    async def sleep(much: float) -> None:
        await made.sleep(much)

    async with served(engine.app()) as url, served(proxy.app()) as admin, aiohttp.ClientSession() as session:
        proxy.states = {url: "ready"} if listing == "listed" else {}
        peers = Peers(session, 30.0)
        asked = None if listing == "no proxy" else ProxyAdmin(peers, admin)
        made = Story(engine, Surroundings(peers, asked, limits, lambda: seconds[0], sleep), url, seconds)
        yield made


@pytest.mark.parametrize("listing", ["listed", "not listed", "no proxy"])
def test_an_engine_is_not_stopped_while_a_lease_is_open(listing: str) -> None:
    async def story() -> None:
        async with story_of(listing, Limits(poll_seconds=1.0)) as here:
            here.turns[5.0] = (IDLE, "ok")
            assert await here.outcome() == "stopped"
            assert here.ordered_at == 5.0

    asyncio.run(story())


@pytest.mark.parametrize("listing", ["listed", "not listed", "no proxy"])
def test_a_reading_that_fails_does_not_end_the_wait(listing: str) -> None:
    async def story() -> None:
        async with story_of(listing, Limits(poll_seconds=1.0)) as here:
            here.turns = {2.0: (LEASED, "error"), 3.0: (LEASED, "ok"), 6.0: (IDLE, "ok")}
            assert await here.outcome() == "stopped"
            assert here.ordered_at == 6.0

    asyncio.run(story())


@pytest.mark.parametrize("listing", ["listed", "not listed", "no proxy"])
@pytest.mark.parametrize(("drain_seconds", "stopped_at"), [(300.0, 40.0), (80.0, 40.0), (20.0, 10.0), (2.0, 1.0)])
def test_a_number_that_stands_still_never_keeps_a_drain_from_its_end(
    listing: str, drain_seconds: float, stopped_at: float
) -> None:
    async def story() -> None:
        async with story_of(listing, Limits(drain_seconds=drain_seconds, poll_seconds=1.0)) as here:
            assert await here.outcome() == "stopped"
            assert here.ordered_at == stopped_at

    asyncio.run(story())


def test_an_engine_that_can_never_be_read_is_waited_for_as_long_as_a_lease() -> None:
    async def story() -> None:
        engine, now = FakeEngine(LEASED, mood="error"), [100.0]
        async with served(engine.app()) as url, aiohttp.ClientSession() as session:
            hand_offs = HandOffs(Peers(session, 30.0), lambda: now[0], 40.0)
            assert not await hand_offs.are_over(url)
            now[0] = 139.0
            assert not await hand_offs.are_over(url)
            now[0] = 140.0
            assert await hand_offs.are_over(url)

    asyncio.run(story())
