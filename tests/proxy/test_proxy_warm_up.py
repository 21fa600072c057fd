"""An engine that is new among others starts with a small share; those that start together do not wait."""

from __future__ import annotations

import asyncio
import contextlib

from dynamo_proxy.config import Routing
from dynamo_proxy.policy import warm_up_limit
from dynamo_proxy.server import ProxyServer

from tests.proxy.proxy_fakes import Client, FakeEngine, chat, post, proxy_before, run, wait_until


def test_the_share_grows_from_one_request_to_a_whole_share() -> None:
    assert [warm_up_limit(20.0, age, 10.0) for age in (0.0, 0.4, 5.0, 10.0)] == [1.0, 1.0, 10.0, 20.0]
    assert warm_up_limit(0.0, 9.0, 10.0) == 1.0


async def in_flight_after(proxy: ProxyServer, old: FakeEngine, new: FakeEngine, count: int) -> tuple[int, int]:
    """Open streams on both engines: six on the old one, then so many more."""
    async with contextlib.AsyncExitStack() as stack:
        for number in range(6 + count):
            if number == 6:
                proxy.add_engine(new.address)
                await wait_until(lambda: proxy.registry.find(new.address).takes_requests, "it is ready")
            client = await stack.enter_async_context(Client.to(proxy.port))
            client.send(post("/v1/chat/completions", chat(f"{number} ", stream=True)))
            await client.head()
        found = tuple(proxy.ledger.load(proxy.registry.find(e.address).slot).in_flight for e in (old, new))
        assert old.hold is not None
        old.hold.set()
        await wait_until(lambda: old.active + new.active == 0, "all ended")
    return found[0], found[1]


def test_a_new_engine_is_not_flooded() -> None:
    async def body(seconds: float) -> tuple[int, int]:
        old, new = await FakeEngine().start(), await FakeEngine().start()
        old.hold = new.hold = asyncio.Event()
        routing = Routing(warm_up_seconds=seconds)
        async with proxy_before(old, routing=routing, router_mode="least-loaded") as proxy:
            proxy.registry.ready_since[0] -= 60  # it has been here for a while
            found = await in_flight_after(proxy, old, new, 6)
            proxy.check()
        await new.stop()
        return found

    assert run(body(3600.0)) == (11, 1)
    assert run(body(0.0)) == (6, 6)


def test_engines_that_start_together_and_the_only_one_take_what_comes() -> None:
    async def body() -> None:
        old, new = await FakeEngine().start(), await FakeEngine().start()
        async with proxy_before(old, new, routing=Routing(warm_up_seconds=3600.0)) as proxy:
            assert proxy.registry.warming == {}
            first, second = (proxy.registry.find(engine.address) for engine in (old, new))
            proxy.registry.ready_since[first.slot] -= 60
            proxy.registry.became_ready(second, asyncio.get_running_loop().time())
            assert list(proxy.registry.warming) == [second.slot]
            first.draining = True
            new.hold = asyncio.Event()
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(4):  # new or not: there is no other
                    client = await stack.enter_async_context(Client.to(proxy.port))
                    client.send(post("/v1/chat/completions", chat(stream=True)))
                    assert (await client.head()).status == 200
                new.hold.set()
                await wait_until(lambda: new.active == 0, "all ended")

    run(body())
