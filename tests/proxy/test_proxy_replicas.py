"""Several proxies before one fleet: what they tell each other, signed; and that losing one loses nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from dynamo_proxy.cli import FLAGS, read_config
from dynamo_proxy.config import ProxyConfig, Replicas, Routing, parse_replicas
from dynamo_proxy.errors import ConfigError, ListenError
from dynamo_proxy.ledger import Counts, Ledger
from dynamo_proxy.policy import OverlapRule
from dynamo_proxy.replica_wire import Chain, Home, News, Order, Spent, _signature, parcels, sign, verify
from dynamo_proxy.server import routing_state
from dynamo_proxy.supervisor import Supervisor
from hypothesis import given
from hypothesis import strategies as st

from tools.server_process import free_port

from .proxy_fakes import Client, FakeEngine, ask, chat, post, proxy_before, run, wait_until

KEY = b"sixteen bytes or more"
LONG = "The quick brown fox jumps over the lazy dog. " * 100
counts = st.builds(Counts, st.integers(0, 99), st.integers(0, 10**6), st.integers(0, 10**6))


def places(folder: Path, count: int) -> list[Replicas]:
    names = [f"unix:{folder / f'r{number}'}" for number in range(count)]
    return [Replicas(name, tuple(other for other in names if other != name), KEY) for name in names]


def test_a_proxy_sees_the_load_and_the_prompts_of_another(tmp_path: Path) -> None:
    async def body() -> None:
        engines = [await FakeEngine().start(), await FakeEngine().start()]
        first, second = places(tmp_path, 2)
        before_both = proxy_before(*engines, replicas=first)
        async with before_both as one, proxy_before(*engines, replicas=second, inner=True) as two:
            hold = engines[0].hold = engines[1].hold = asyncio.Event()
            async with Client.to(one.port) as client:
                client.send(post("/v1/chat/completions", chat(LONG, stream=True)))
                await wait_until(lambda: one.ledger.in_flight == 1)
                busy = next(slot for slot in (0, 1) if one.ledger.load(slot).in_flight)
                await wait_until(lambda: two.ledger.load(busy).in_flight == 1, "the load is told")
                assert two.ledger.own(busy) == Counts()
                await wait_until(lambda: len(two.knowledge.approx) > 0, "the prompt is told")
                answer = await ask(two.port, post("/v1/chat/completions", chat("short")))
                assert answer.headers["x-dynamo-engine"] == f"engine-{1 - busy}"
                hold.set()
                await client.answer()
            await wait_until(lambda: two.ledger.load(busy).in_flight == 0, "its end is told")
            answer = await ask(two.port, post("/v1/chat/completions", chat(LONG)))
            assert answer.headers["x-dynamo-engine"] == f"engine-{busy}"
            assert int(answer.headers["x-dynamo-matched-tokens"]) > 500
            one.check()
            two.check()

    run(body())


def test_a_session_lives_at_one_engine_whichever_proxy_it_comes_to(tmp_path: Path) -> None:
    """Also when both placed it at once, before they heard of each other's choice: they agree on one."""

    async def body() -> None:
        engines = [await FakeEngine().start() for _ in range(3)]
        first, second = places(tmp_path, 2)
        routing = Routing(session_seconds=60)
        before_both = proxy_before(*engines, replicas=first, routing=routing)
        async with before_both as one, proxy_before(*engines, replicas=second, routing=routing, inner=True) as two:

            async def home(port: int, session: str) -> str:
                asked = post("/v1/chat/completions", chat("hello", session_id=session))
                return (await ask(port, asked)).headers["x-dynamo-engine"]

            here, there = (proxy.router.state.sessions for proxy in (one, two))
            assert here is not None
            assert there is not None
            for number in range(8):
                lives = await home(one.port, f"s{number}")
                await wait_until(lambda: len(there) == len(here), "it is told")
                assert await home(two.port, f"s{number}") == lives
            now = asyncio.get_running_loop().time()
            here.placed(7, 0, now)
            there.placed(7, 2, now)
            await wait_until(lambda: here.slot(7, now) == there.slot(7, now), "they agree")

    run(body())


def test_a_lost_proxy_takes_its_load_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_proxy.replicas._SILENCE_SECONDS", 0.3)
    monkeypatch.setattr("dynamo_proxy.replicas._REPEAT_SECONDS", 0.05)

    async def body() -> None:
        engine = await FakeEngine().start()
        first, second = places(tmp_path, 2)
        async with proxy_before(engine, replicas=second) as two:
            hold = engine.hold = asyncio.Event()
            also = proxy_before(engine, replicas=first, inner=True)
            async with also as one, Client.to(one.port) as client:
                client.send(post("/v1/chat/completions", chat(stream=True)))
                await wait_until(lambda: two.ledger.load(0).in_flight == 1)
                assert one.replicas is not None
                one.replicas.close()  # as if it were killed: it says nothing more
                await wait_until(lambda: two.ledger.load(0).in_flight == 0, "its load is forgotten")
                hold.set()
                await client.answer()
            assert two.replicas is not None
            assert two.replicas.others == 0
            engine.hold = None
            assert (await ask(two.port, post("/v1/chat/completions", chat()))).status == 200

    run(body())


def test_only_signed_news_of_now_is_heard(tmp_path: Path) -> None:
    async def body() -> None:
        engine = await FakeEngine().start()
        (place,) = places(tmp_path, 1)
        async with proxy_before(engine, replicas=place) as server:
            (known,) = server.registry
            loads = ((known.address.url, Counts(5, 5, 5)),)
            news = News("x", 1, 1, time.time(), loads, ())
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:

                def tell(datagram: bytes) -> None:
                    stranger.sendto(datagram, place.listen.removeprefix("unix:"))

                def seen(reason: str) -> float:
                    return float(server.metrics.replica_news.labels(reason)._value.get())

                tell(sign(news, b"another key of enough length"))
                tell(sign(news._replace(wall_seconds=1.0), KEY))
                tell(b"x")
                await wait_until(lambda: seen("bad_signature") == 2 and seen("too_old") == 1)
                assert server.ledger.load(0).in_flight == 0
                tell(sign(news, KEY))
                tell(sign(news, KEY))  # played again
                await wait_until(lambda: seen("applied") == 1 and seen("out_of_order") == 1)
                assert server.ledger.load(0).in_flight == 5
                server.check()

    run(body())


def test_a_place_that_is_taken_stops_the_start(tmp_path: Path) -> None:
    async def body() -> None:
        with pytest.raises(ListenError, match="--replica-sync-listen"):
            async with proxy_before(replicas=Replicas(f"unix:{tmp_path}/no/such/folder", (), KEY)):
                raise AssertionError("it started")

    run(body())


def test_settings_are_checked(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(KEY + b"\n")
    assert parse_replicas("10.0.0.1:8082", ["[::1]:9"], str(key)) == Replicas("10.0.0.1:8082", ("[::1]:9",), KEY)
    assert parse_replicas("", [], "") is None
    bad: list[tuple[str, list[str], Any]] = [
        ("nonsense", [], key), ("10.0.0.1:0", [], key), ("10.0.0.1:1", ["host:1"], key), ("10.0.0.1:1", [], ""),
        ("10.0.0.1:1", [], tmp_path / "none"), ("", ["10.0.0.1:1"], ""),
    ]  # fmt: skip
    for listen, peers, path in bad:
        with pytest.raises(ConfigError):
            parse_replicas(listen, peers, str(path))
    with pytest.raises(ConfigError, match="this proxy's own --replica-sync-listen"):
        parse_replicas("10.0.0.1:8082", ["10.0.0.1:8082"], str(key))
    with pytest.raises(ConfigError, match="needs --replica-sync-key-file"):
        parse_replicas("10.0.0.1:8082", [], "")
    key.write_bytes(b"short\n")
    with pytest.raises(ConfigError, match=f"{key} holds 5 bytes"):
        parse_replicas("10.0.0.1:8082", [], str(key))


def test_flags_become_settings_and_what_contradicts_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(KEY)
    given = {flag.name: flag.default for flag in FLAGS}
    given |= {"engine": ["http://127.0.0.1:1"], "replica_sync_listen": "127.0.0.1:9", "replica_sync_key_file": str(key)}
    given |= {"kv_overlap_score_weight": 2.0, "router_temperature": 0.5, "engine_request_limit": 7}
    config = read_config(given)
    assert config.replicas == Replicas("127.0.0.1:9", (), KEY)
    assert (config.routing.overlap_weight, config.routing.temperature) == (2.0, 0.5)
    state = routing_state(config)
    assert (state.overlap, state.max_in_flight) == (OverlapRule(2.0, 0.5, 16), 7)
    assert read_config({**given, "workers": 2}).workers == 2
    with pytest.raises(ConfigError, match="needs 4 ports"):
        read_config({**given, "workers": 4, "replica_sync_peer": ["127.0.0.1:65533"]})
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:10 is a peer's and that of a worker"):
        read_config({**given, "workers": 2, "replica_sync_peer": ["127.0.0.1:10"]})


def test_workers_of_one_proxy_are_replicas_of_each_other(tmp_path: Path) -> None:
    supervisor = Supervisor(ProxyConfig((), workers=3), tmp_path)
    told = [supervisor._config_of(worker, ()).replicas for worker in supervisor.workers]
    assert all(replicas is not None for replicas in told)
    places = {replicas.listen for replicas in told if replicas is not None}
    assert len(places) == 3
    for replicas in told:
        assert replicas is not None
        assert {replicas.listen, *replicas.peers} == places
        assert len(replicas.key) >= 16
    assert len({replicas.key for replicas in told if replicas is not None}) == 1


def test_workers_of_several_proxies_hear_each_other(tmp_path: Path) -> None:
    """Two proxies of two workers each, as their supervisors would have them: every worker hears of every load."""

    async def body() -> None:
        engine = await FakeEngine().start()
        first, second = free_port(), free_port()
        while abs(first - second) < 2:
            second = free_port()
        places = []
        for own, other in ((first, second), (second, first)):
            replicas = Replicas(f"127.0.0.1:{own}", (f"127.0.0.1:{other}",), KEY)
            supervisor = Supervisor(ProxyConfig((), workers=2, replicas=replicas), tmp_path)
            places += [supervisor._config_of(worker, ()).replicas for worker in supervisor.workers]
        assert len({place.listen for place in places if place is not None}) == 4
        hold = engine.hold = asyncio.Event()
        async with contextlib.AsyncExitStack() as stack:
            enter = stack.enter_async_context
            proxies = [await enter(proxy_before(engine, replicas=p, inner=bool(n))) for n, p in enumerate(places)]
            client = await enter(Client.to(proxies[0].port))
            client.send(post("/v1/chat/completions", chat(LONG, stream=True)))
            for proxy in proxies:
                await wait_until(lambda proxy=proxy: proxy.ledger.load(0).in_flight == 1, "every one knows")
            hold.set()
            await client.answer()
            for proxy in proxies:
                await wait_until(lambda proxy=proxy: proxy.ledger.load(0).in_flight == 0, "and knows its end")

    run(body())


# --- the wire


chains = st.lists(st.builds(Chain, st.sampled_from("ab"), st.lists(st.integers(0, 2**64 - 1), max_size=300).map(tuple)))


grants = st.lists(
    st.builds(Spent, st.integers(0, 2**64 - 1), st.just("requests"), *(st.floats(-1e12, 1e12) for _ in range(2))),
    max_size=60,
)


placed = st.lists(st.builds(Home, st.integers(0, 2**64 - 1), st.just("http://engine.of.a.fleet:8000")), max_size=60)


@given(st.lists(st.tuples(st.sampled_from("abc"), counts), max_size=60), chains, grants, placed)
def test_parcels_carry_everything_in_small_datagrams(
    loads: list[tuple[str, Counts]], prompts: list[Chain], spent: list[Spent], homes: list[Home]
) -> None:
    told_loads: list[tuple[str, Counts]] = []
    told_chains: list[Chain] = []
    told_spent: list[Spent] = []
    told_homes: list[Home] = []
    for number, parcel in enumerate(parcels(loads, prompts, spent, homes)):
        news = News("me", 7, number, 100.0, *parcel)
        datagram = sign(news, KEY)
        assert len(datagram) < 1400
        assert verify(datagram, KEY, 110.0) == news
        told_loads += news.loads
        told_chains += news.chains
        told_spent += news.spent
        told_homes += news.homes
    assert (told_loads, told_spent, told_homes) == (loads, spent, homes)
    assert told_chains == [Chain(engine, nodes[:120]) for engine, nodes in prompts]


@given(st.binary(max_size=200))
def test_no_bytes_are_news(noise: bytes) -> None:
    assert isinstance(verify(noise, KEY, 0.0), str)


numbers = st.integers(-5, 2**63)
odd = st.one_of(st.none(), numbers, st.floats(), st.text(max_size=3), st.lists(numbers, max_size=4))


@given(st.integers(0, 7), st.integers(-1, 3), odd, st.sampled_from([3, 4]))
def test_a_peer_with_the_key_that_talks_nonsense_is_not_heard(
    where: int, within: int, value: Any, version: int
) -> None:
    """It has a mistake of its own: nothing of that may come through, or end the reading of the others."""
    said: list[Any] = [
        "b", 1, 1, 0.0, [["http://a:1", 1, 1, 1]], [["http://a:1", [1]]], [[1, "requests", 1.0, 1.0]], [[1, "http://a:1"]]
    ]  # fmt: skip
    if where < 4 or within < 0:
        said[where] = value
    else:
        said[where][0][within % len(said[where][0])] = value
    datagram = msgspec.msgpack.encode([version, *said])
    news = verify(_signature(datagram, KEY) + datagram, KEY, 0.0)
    if isinstance(news, News):
        assert Order().is_new(news)
        assert isinstance(news.sender, str)
        assert type(news.life) is type(news.number) is int
        assert all(type(node) is int and node >= 0 for chain in news.chains for node in chain.nodes)
        assert all(type(count) is int and count >= 0 for _, counts in news.loads for count in counts)
    else:
        assert version == 3 or news in ("other_version", "malformed")


def test_a_new_life_is_new_and_an_old_number_is_not() -> None:
    order = Order()
    news = News("a", 5, 3, 0.0, (), ())
    assert order.is_new(news)
    assert not order.is_new(news)
    assert not order.is_new(news._replace(number=2))
    assert order.is_new(news._replace(life=6, number=0))
    assert not order.is_new(news._replace(number=9))
    assert order.is_new(news._replace(sender="b", number=0))


@given(st.lists(st.tuples(st.sampled_from(["lease", "end", "a", "b", "lose a"]), st.integers(0, 2), counts)))
def test_the_ledger_keeps_own_and_told_apart(steps: list[tuple[str, int, Counts]]) -> None:
    ledger = Ledger()
    leases = []
    told: dict[tuple[str, int], Counts] = {}
    for action, slot, what in steps:
        if action == "lease":
            leases.append(ledger.charge(slot, what.pending_tokens, what.active_tokens))
        elif action == "end" and leases:
            ledger.release(leases.pop())
        elif action == "lose a":
            ledger.forget_proxy("a")
            told = {key: value for key, value in told.items() if key[0] != "a"}
        elif action in ("a", "b"):
            ledger.told(action, slot, what)
            told[action, slot] = what
        ledger.check()
        for each in range(3):
            others = [value for (_, at), value in told.items() if at == each]
            own = ledger.own(each)
            assert ledger.load(each).in_flight == own.in_flight + sum(other.in_flight for other in others)
    assert ledger.in_flight == len(leases)
