"""Scraping: both engines' metric names, and everything that can go wrong between two looks."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from dynamo_planner.errors import ObservationError
from dynamo_planner.exposition import EngineReading, parse_engine_metrics
from dynamo_planner.observer import ObservationFailure, Observer
from dynamo_planner.peers import Peers, ProxyAdmin
from dynamo_planner.records import Delta, FleetObservation
from dynamo_planner.tracking import EngineTracker, ProxyTracker, Targets
from hypothesis import given
from hypothesis import strategies as st

from tests.planner.planner_fakes import FakeEngine, FakeProxy, served, sglang_text, vllm_text


def reading(text: str) -> EngineReading:
    return parse_engine_metrics(text)


def test_vllm_names() -> None:
    seen = reading(vllm_text(running=3, waiting=2, kv=0.25))
    assert (seen.dialect, seen.running, seen.waiting, seen.kv_usage) == ("vllm", 3, 2, 0.25)
    assert (seen.prompt_tokens_total, seen.generation_tokens_total) == (1000, 200)
    assert seen.ttft is not None
    assert (seen.ttft.count, seen.ttft.sum_seconds) == (10, 2)
    assert seen.itl is not None
    assert seen.itl.count == 190
    assert seen.queue_wait is not None


def test_sglang_names() -> None:
    seen = reading(sglang_text(running=3, waiting=2, kv=0.25))
    assert (seen.dialect, seen.running, seen.waiting, seen.kv_usage) == ("sglang", 3, 2, 0.25)
    assert seen.itl is not None
    assert seen.itl.count == 10
    assert seen.queue_wait is None


def test_ranks_are_summed_and_kv_use_is_their_mean() -> None:
    two = vllm_text(running=3, kv=0.2) + vllm_text(running=4, kv=0.6).replace('engine="0"', 'engine="1"')
    seen = reading(two)
    assert (seen.running, seen.prompt_tokens_total) == (7, 2000)
    assert seen.kv_usage == pytest.approx(0.4)


def test_nan_is_unknown_and_never_zero() -> None:
    assert reading(vllm_text(kv="NaN")).kv_usage is None
    assert reading(vllm_text(kv="+Inf")).kv_usage is None
    assert reading(vllm_text(kv=1.7)).kv_usage == 1.0
    with pytest.raises(ObservationError, match="missing or NaN"):
        reading(vllm_text(running="NaN"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not_an_engine"),
        ("# TYPE up gauge\nup 1\n", "not_an_engine"),
        ("<html><body>404</body></html>", "unreadable"),
        ("vllm:num_requests_running{engine=", "unreadable"),
        ("vllm:num_requests_running 1\n", "missing_metrics"),
        ("\x00\x01\x02", "unreadable"),
    ],
)
def test_garbage_has_a_reason(text: str, reason: str) -> None:
    with pytest.raises(ObservationError) as caught:
        reading(text)
    assert caught.value.reason == reason


@given(st.text(max_size=200) | st.text(max_size=50).map(lambda tail: vllm_text() + tail))
def test_any_text_is_a_reading_or_one_error(text: str) -> None:
    reasons = {"unreadable", "not_an_engine", "missing_metrics"}
    try:
        outcome = reading(text).running >= 0
    except ObservationError as error:
        outcome = error.reason in reasons
    assert outcome


def test_deltas_start_with_the_second_look() -> None:
    tracker = EngineTracker("http://a", 0.0)
    first = tracker.read(reading(vllm_text()), 0.0)
    assert (first.prompt_tokens, first.ttft, first.interval_seconds) == (None, None, 0.0)
    second = tracker.read(reading(vllm_text(scale=3)), 10.0)
    assert (second.prompt_tokens, second.ttft, second.interval_seconds) == (2000, Delta(4.0, 20), 10.0)
    tracker.check()


def test_samples_within_the_target_are_read_off_the_buckets() -> None:
    def page(early: int, middle: int, all_of_them: int) -> EngineReading:
        name = "vllm:time_to_first_token_seconds"
        edges = f'{name}_bucket{{le="0.1"}} {early}\n{name}_bucket{{le="0.5"}} {middle}\n'
        rest = f'{name}_bucket{{le="+Inf"}} {all_of_them}\n{name}_sum 1\n{name}_count {all_of_them}\n'
        return reading("vllm:num_requests_running 1\nvllm:num_requests_waiting 0\n" + edges + rest)

    for target, within in ((0.1, 10.0), (0.5, 30.0), (0.3, 20.0), (0.05, 5.0), (2.0, 30.0)):
        tracker = EngineTracker("http://a", 0.0, targets=Targets(ttft_seconds=target))
        tracker.read(page(5, 10, 20), 0.0)
        seen = tracker.read(page(15, 40, 60), 10.0)
        assert seen.ttft is not None
        assert (seen.ttft.count, seen.ttft.within) == (40, pytest.approx(within)), target


def test_a_restart_gives_no_delta_and_makes_the_engine_young_again() -> None:
    tracker = EngineTracker("http://a", 0.0)
    tracker.read(reading(vllm_text(scale=5)), 0.0)
    again = tracker.read(reading(vllm_text(scale=1)), 100.0)
    assert again.restarted
    assert (again.prompt_tokens, again.age_seconds, again.stale) == (None, 0.0, False)
    assert tracker.read(reading(vllm_text(scale=2)), 110.0).prompt_tokens == 1000
    tracker.check()


def test_work_without_progress_is_stale_and_idleness_is_not() -> None:
    tracker = EngineTracker("http://a", 0.0, frozen_seconds=30)
    for now in (0.0, 10.0, 29.0):
        assert not tracker.read(reading(vllm_text(running=4)), now).stale
    assert tracker.read(reading(vllm_text(running=4)), 31.0).stale_reason == "frozen"
    assert not tracker.read(reading(vllm_text(running=0)), 40.0).stale
    tracker.check()


def test_an_engine_out_of_reach_is_stale_then_down_then_back() -> None:
    tracker, gone = EngineTracker("http://a", 0.0, down_seconds=60), ObservationError("timeout", "no answer")
    tracker.read(reading(vllm_text()), 10.0)
    assert (tracker.failed(gone, 20.0).state, tracker.failed(gone, 20.0).stale_reason) == ("ready", "timeout")
    assert tracker.failed(gone, 70.0).state == "down"
    back = tracker.read(reading(vllm_text(scale=2)), 80.0)
    assert (back.state, back.prompt_tokens, back.interval_seconds) == ("ready", 1000, 70.0)


def test_an_engine_that_answers_without_metrics_is_not_down() -> None:
    tracker, mute = EngineTracker("http://a", 0.0, down_seconds=60), ObservationError("http_status", "404")
    assert tracker.failed(mute, 500.0).state == "ready"
    assert tracker.failed(ObservationError("timeout", ""), 559.0).state == "ready"
    assert tracker.failed(ObservationError("timeout", ""), 560.0).state == "down"


def test_proxy_totals_that_fall_are_a_restart() -> None:
    tracker = ProxyTracker()
    assert tracker.read((100, 1000, 0), 3, 0.0).arrivals is None
    assert tracker.read((150, 2000, 400), 3, 10.0).arrivals == 50
    assert tracker.read((5, 10, 0), 0, 20.0).arrivals is None
    tracker.check()


async def look(
    engines: tuple[str, ...], proxy_url: str | None = None
) -> tuple[FleetObservation, list[ObservationFailure]]:
    async with aiohttp.ClientSession() as session:
        peers = Peers(session, 0.3)
        observer = Observer(engines, peers, ProxyAdmin(peers, proxy_url) if proxy_url else None)
        seen = await observer.observe(1.0, {})
        observer.check()
        return seen


def test_one_look_at_good_hanging_broken_and_dead_engines() -> None:
    async def story() -> None:
        good, hang, error, junk = (
            FakeEngine(),
            FakeEngine(mood="hang"),
            FakeEngine(mood="error"),
            FakeEngine("<p>"),
        )
        async with (
            served(good.app()) as a,
            served(hang.app()) as b,
            served(error.app()) as c,
            served(junk.app()) as d,
        ):
            fleet, failures = await look((a, b, c, d, "http://127.0.0.1:9"))
        reasons = {engine.url: engine.stale_reason for engine in fleet.engines}
        assert reasons == {
            a: "",
            b: "timeout",
            c: "http_status",
            d: "unreadable",
            "http://127.0.0.1:9": "unreachable",
        }
        assert sorted(failure.reason for failure in failures) == sorted(filter(None, reasons.values()))
        assert fleet.current == 5

    asyncio.run(story())


def test_the_proxy_names_engines_and_its_states_count() -> None:
    async def story() -> None:
        async with served(FakeEngine().app()) as b:
            a = "http://127.0.0.1:9"  # on its way out: nobody is surprised that it gives no answer any more
            proxy = FakeProxy(states={a: "draining", b: "ready"}, in_flight={a: 2})
            async with served(proxy.app()) as admin:
                fleet, failures = await look((), admin)
                assert failures == []
                assert {engine.url: engine.state for engine in fleet.engines} == {a: "draining", b: "ready"}
                assert fleet.current == 1
                assert fleet.proxy is not None
                assert fleet.proxy.in_flight == 2
                proxy.broken.add("list")
                fleet, failures = await look((b,), admin)
                assert [failure.reason for failure in failures] == ["proxy_status"]
                assert fleet.proxy is not None
                assert fleet.proxy.stale_reason == "proxy_status"
                assert fleet.engines[0].usable
                assert not fleet.is_complete

    asyncio.run(story())


def test_an_admin_port_that_is_none_is_said_to_be_none() -> None:
    async def story() -> None:
        async with served(FakeEngine().app()) as not_a_proxy:
            _, failures = await look((), not_a_proxy)
        assert failures[0].reason == "proxy_status"
        assert "admin port" in failures[0].text

    asyncio.run(story())


def test_an_engine_that_was_ready_and_is_down_is_no_supply() -> None:
    async def story() -> None:
        proxy = FakeProxy(states={"http://127.0.0.1:9": "down"})
        async with served(proxy.app()) as admin:
            fleet, _ = await look((), admin)
        assert (fleet.engines[0].state, fleet.current) == ("down", 0)

    asyncio.run(story())


@pytest.mark.parametrize("state", ["starting", "down"])  # the proxy's patience ends before ours
def test_an_engine_of_others_that_starts_for_ever_stops_counting_as_supply(state: str) -> None:
    async def story() -> None:
        url = "http://127.0.0.1:9"
        proxy = FakeProxy(states={url: state}, never_ready={url})
        async with served(proxy.app()) as admin, aiohttp.ClientSession() as session:
            peers = Peers(session, 1.0)
            observer = Observer((), peers, ProxyAdmin(peers, admin))
            counts = [(await observer.observe(now, {}))[0].current for now in (0.0, 599.0, 601.0)]
            assert counts == [1, 1, 0]
            own = [(await observer.observe(now, {url: "starting"}))[0].current for now in (602.0, 2000.0)]
            assert own == [1, 1]  # ours has a deadline of its own
            observer.check()

    asyncio.run(story())
