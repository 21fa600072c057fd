"""Saturated engines: a bounded queue by priority, then 429 or 503; and sessions that stay where they live."""

from __future__ import annotations

import asyncio

from dynamo_proxy.config import Routing
from dynamo_proxy.sessions import Sessions
from hypothesis import given
from hypothesis import strategies as st

from .proxy_fakes import Answer, Client, FakeEngine, ask, chat, post, proxy_before, run, wait_until

ROUTE = "/v1/chat/completions"


def texts(engine: FakeEngine) -> list[str]:
    return [prompt["messages"][0]["content"] for prompt in engine.prompts]


def test_requests_wait_for_room_and_go_by_priority() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        async with proxy_before(engine, routing=Routing(engine_request_limit=1)) as server:
            room = server.front_end.waiting
            assert room is not None
            hold = engine.hold = asyncio.Event()
            first = asyncio.ensure_future(ask(server.port, post(ROUTE, chat("first", stream=True))))
            await wait_until(lambda: engine.active == 1)
            waiting: list[asyncio.Future[Answer]] = []
            for text, priority in (("late", 5), ("later", 5), ("soon", -1)):
                waiting.append(asyncio.ensure_future(ask(server.port, post(ROUTE, chat(text, priority=priority)))))
                await wait_until(lambda: len(room) == len(waiting))
            assert texts(engine) == ["first"]
            hold.set()
            answers = await asyncio.gather(first, *waiting)
            assert [answer.status for answer in answers] == [200] * 4
            assert texts(engine) == ["first", "soon", "late", "later"]
            server.check()

    run(body())


def test_a_full_queue_is_429_and_a_long_wait_503_and_who_leaves_makes_room() -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        routing = Routing(engine_request_limit=1, queue_size=1, queue_seconds=0.5)
        async with proxy_before(engine, routing=routing) as server:
            room = server.front_end.waiting
            assert room is not None
            hold = engine.hold = asyncio.Event()
            first = asyncio.ensure_future(ask(server.port, post(ROUTE, chat(stream=True))))
            await wait_until(lambda: engine.active == 1)
            async with Client.to(server.port) as leaver:
                leaver.send(post(ROUTE, chat("never")))
                await wait_until(lambda: len(room) == 1)
                refused = await ask(server.port, post(ROUTE, chat()))
                assert (refused.status, refused.json()["error"]["code"]) == (429, "queue_full")
                assert "retry-after" in refused.headers
            await wait_until(lambda: len(room) == 0)
            timed_out = await ask(server.port, post(ROUTE, chat()))
            assert (timed_out.status, timed_out.json()["error"]["code"]) == (503, "queue_timeout")
            assert "retry-after" in timed_out.headers
            hold.set()
            assert (await first).status == 200
            assert (await ask(server.port, post(ROUTE, chat()))).status == 200
            assert "never" not in texts(engine)
            server.check()

    run(body())


def test_with_room_elsewhere_nobody_waits_and_the_full_engine_gets_nothing() -> None:
    async def body() -> None:
        engines = [await FakeEngine().start(), await FakeEngine().start()]
        async with proxy_before(*engines, routing=Routing(engine_request_limit=1)) as server:
            long = "the same long prompt " * 200
            await ask(server.port, post(ROUTE, chat(long)))
            home = next(engine for engine in engines if engine.prompts)
            hold = home.hold = asyncio.Event()
            first = asyncio.ensure_future(ask(server.port, post(ROUTE, chat(long, stream=True))))
            await wait_until(lambda: home.active == 1)
            assert (await ask(server.port, post(ROUTE, chat(long)))).status == 200
            assert len(home.prompts) == 2, "its prefix is there, but no room"
            hold.set()
            await first

    run(body())


def test_a_session_stays_on_its_engine_while_that_takes_requests() -> None:
    async def body() -> None:
        engines = [await FakeEngine().start() for _ in range(3)]
        async with proxy_before(*engines, routing=Routing(session_seconds=60)) as server:

            async def where(**fields: str) -> str:
                headers = [f"x-session-id: {fields['header']}"] if "header" in fields else []
                extra = {"prompt_cache_key": fields["field"]} if "field" in fields else {}
                return (await ask(server.port, post(ROUTE, chat("hi", **extra), *headers))).headers["x-dynamo-engine"]

            assert len({await where(header="a") for _ in range(8)}) == 1
            assert len({await where(field="b") for _ in range(8)}) == 1
            home = await where(header="a")
            gone = next(engine for engine in server.registry if engine.name == home)
            gone.draining = True
            assert await where(header="a") != home
            gone.draining = False
            assert await where(header="a") != home, "it lives elsewhere now"
            server.check()

    run(body())


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 5))))
def test_sessions_are_bounded_and_forget_in_time(steps: list[tuple[int, int, int]]) -> None:
    sessions, now = Sessions(10.0, max_sessions=4), 0.0
    last: dict[int, tuple[int, float]] = {}
    for name, slot, pause in steps:
        now += pause
        known = sessions.slot(name, now)
        assert known is None or (known == last[name][0] and now - last[name][1] < 10)
        sessions.placed(name, slot, now)
        last[name] = slot, now
        assert sessions.slot(name, now) == slot
        sessions.check()
    assert sessions.take_news() == {name: slot for name, (slot, _) in last.items()}
    assert sessions.take_news() == {}
    for slot in range(4):
        sessions.forget_slot(slot)
    assert len(sessions) == 0
