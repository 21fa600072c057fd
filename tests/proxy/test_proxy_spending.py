"""Limits of a key across worker processes and proxies: it gets them once, not once from each."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path

import pytest
from dynamo_proxy.api_keys import KeyRing
from dynamo_proxy.replica_wire import Spent
from dynamo_proxy.server import ProxyServer
from dynamo_proxy.spending import Spending
from hypothesis import given
from hypothesis import strategies as st

from .proxy_fakes import FakeEngine, RawEngine, ask, chat, post, proxy_before, run, wait_until
from .test_proxy_cli import ready
from .test_proxy_guard import ROUTE, hashed, key_file
from .test_proxy_replicas import places
from .test_proxy_workers import workers

ASKED = post(ROUTE, chat(), "x-api-key: a")


def left(proxy: ProxyServer, what: str = "requests") -> float:
    assert proxy.guard is not None
    caller = proxy.guard._keys.find(b"a")
    assert caller is not None
    return dict(caller.limits.buckets())[what].level


def test_two_workers_grant_what_one_may(tmp_path: Path) -> None:
    """Real processes. What comes back while the test runs is granted too; untold are at most a few requests."""

    async def body(path: str) -> None:
        engine = await FakeEngine().start()
        async with workers("--engine", engine.url, "--api-keys-file", path) as (_, port, _, _):
            await ready(port)
            began = time.monotonic()
            statuses = [(await ask(port, ASKED)).status for _ in range(240)]
            back = time.monotonic() - began
            granted = statuses.count(200)
            assert set(statuses) == {200, 429}
            assert 60 <= granted <= 60 + back + 10, (granted, back)
        await engine.stop()

    run(body(key_file(tmp_path, f"alice {hashed('a')} requests-per-minute=60")))


def test_two_proxies_grant_what_one_may_and_a_third_that_comes_later_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        path = key_file(tmp_path, f"alice {hashed('a')} requests-per-minute=20", f"bob {hashed('b')}")
        first, second, third = places(tmp_path, 3)
        async with contextlib.AsyncExitStack() as stack:
            enter = stack.enter_async_context
            one = await enter(proxy_before(engine, replicas=first, api_keys_path=path))
            two = await enter(proxy_before(engine, replicas=second, api_keys_path=path, inner=True))
            began = time.monotonic()
            statuses = [(await ask(proxy.port, ASKED)).status for _ in range(40) for proxy in (one, two)]
            back = (time.monotonic() - began) * 20 / 60
            assert 20 <= statuses.count(200) <= 20 + back + 5
            assert (await ask(two.port, post(ROUTE, chat(), "x-api-key: b"))).status == 200
            three = await enter(proxy_before(engine, replicas=third, api_keys_path=path, inner=True))
            await wait_until(lambda: left(three) < 10, "it hears what is used up")
            for proxy in (one, two, three):
                proxy.check()

    run(body())


def test_tokens_that_one_proxy_granted_are_owed_at_the_other(tmp_path: Path) -> None:
    async def telling(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        answer = json.dumps({"usage": {"total_tokens": 5000}}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(answer), answer))

    async def body() -> None:
        engine = await RawEngine(telling).start()
        path = key_file(tmp_path, f"alice {hashed('a')} tokens-per-minute=1000")
        first, second = places(tmp_path, 2)
        async with (
            proxy_before(engine, replicas=first, api_keys_path=path) as one,
            proxy_before(engine, replicas=second, api_keys_path=path, inner=True) as two,
        ):
            assert (await ask(one.port, ASKED)).status == 200
            await wait_until(lambda: left(two, "tokens") < 0, "the other hears of it")
            refused = await ask(two.port, ASKED)
            assert refused.status == 429
            assert 200 < int(refused.headers["retry-after"]) <= 241
            assert one.replicas is not None
            one.replicas.close()
            assert left(two, "tokens") < 0, "what a lost proxy granted stays charged"

    run(body())


def ring(folder: Path) -> KeyRing:
    return KeyRing(Path(key_file(folder, f"alice {hashed('a')} requests-per-minute=1000", f"bob {hashed('b')}")), 0.0)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5), st.booleans()), max_size=60))
def test_words_that_are_lost_are_made_good_by_the_next(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, bool]]
) -> None:
    """Three proxies in one instant: whatever is lost between, after a last word of each all have charged everything."""
    rings = [ring(tmp_path_factory.mktemp("keys")) for _ in range(3)]
    sides = [Spending(keys) for keys in rings]
    granted = 0

    def grant(number: int, amount: int, heard: bool) -> None:
        caller = rings[number].find(b"a")
        assert caller is not None
        assert caller.limits.requests is not None
        caller.limits.requests.spend(amount, 0.0)
        sides[number].granted(caller)
        news = sides[number].news(0.0)
        for other in range(3):
            if heard and other != number:
                sides[other].told(str(number), news, 0.0)

    for number in range(3):  # each is known before words are lost
        grant(number, 1, heard=True)
        granted += 1
    for number, amount, heard in steps:
        grant(number, amount, heard)
        granted += amount
    for number in range(3):
        grant(number, 1, heard=True)
        granted += 1
    for keys in rings:
        caller = keys.find(b"a")
        assert caller is not None
        assert caller.limits.requests is not None
        assert caller.limits.requests.level == 1000 - granted
        keys.check()


def test_what_is_told_of_unknown_keys_or_limits_changes_nothing_and_unused_limits_are_not_told(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    side = Spending(keys)
    alice, bob = keys.find(b"a"), keys.find(b"b")
    assert alice is not None
    assert bob is not None
    odd = [Spent(1, "requests", 9, 9), Spent(alice.number, "tokens", 9, 9), Spent(bob.number, "requests", 9, 9)]
    side.told("x", odd, 0.0)
    assert alice.limits.requests is not None
    assert alice.limits.requests.level == 1000
    side.tell_all()
    assert side.news(0.0) == []
    side.told("x", [Spent(alice.number, "requests", 50, 900)], 0.0)
    side.tell_all()
    assert side.news(0.0) == [Spent(alice.number, "requests", 0, 900)]
    side.forget("x")
    assert side.proxies == ()
