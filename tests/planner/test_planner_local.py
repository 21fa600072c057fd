"""The local actuator on real child processes: start, drain, stop, and every way in which that fails."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from dynamo_planner.child_process import ChildProcess, group_alive
from dynamo_planner.errors import ActuationError
from dynamo_planner.local_actuator import LocalProcessActuator, free_port

from tests.planner.planner_fakes import Bench, FakeProxy, bench, child_command, served


def actuate(folder: Path, *flags: str, **more: object) -> dict[str, object]:
    return {"advisory": False, "engine_command": child_command(folder, *flags), "max_replicas": 3, **more}


def replicas(stand: Bench) -> LocalProcessActuator:
    actuator = stand.planner.parts.actuator
    assert isinstance(actuator, LocalProcessActuator)
    return actuator


def url_in(line: str) -> str:
    return line.split()[1].rstrip(":")


def two_ready(stand: Bench) -> bool:
    return sum(line.startswith("ready http") for line in stand.said) == 2


@asynccontextmanager
async def behind_a_proxy(
    folder: Path, *flags: str, is_empty: bool = False, proxy: FakeProxy | None = None, **more: object
) -> AsyncIterator[tuple[Bench, FakeProxy]]:
    """A planner beside a proxy, with two replicas that are ready unless it `is_empty`."""
    proxy = proxy or FakeProxy()
    async with (
        served(proxy.app()) as admin,
        bench(folder, **actuate(folder, *flags, proxy_admin=admin, **more)) as stand,
    ):
        if not is_empty:
            await stand.planner.order(2)
            await stand.eventually(lambda: two_ready(stand))
        yield stand, proxy


async def get(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url) as answer:
        return await answer.text()


def test_the_minimum_is_started_registered_and_gone_after_close(tmp_path: Path) -> None:
    async def story() -> None:
        async with behind_a_proxy(tmp_path, is_empty=True) as (stand, proxy):
            decision, outcome = await stand.planner.tick()
            assert (decision.desired, decision.reason, outcome.accepted) == (1, "below_min", True)
            assert "output in" in outcome.actions[0]
            url = url_in(await stand.until("ready http"))
            assert proxy.states == {url: "ready"}
            pid = replicas(stand)._replicas[url].child.pid
            decision, _ = await stand.planner.tick()
            assert (decision.current, decision.desired, decision.reason) == (1, 1, "steady")
            await stand.planner.close()
            assert not group_alive(pid)
            assert proxy.states == {}
            assert proxy.calls == ["register", "drain", "remove", "remove"]

    asyncio.run(story())


def test_a_replica_is_registered_with_the_role_of_its_pool(tmp_path: Path) -> None:
    async def story() -> None:
        async with behind_a_proxy(tmp_path, is_empty=True, role="prefill") as (stand, proxy):
            await stand.planner.tick()
            url = url_in(await stand.until("ready http"))
            assert (proxy.states, proxy.roles) == ({url: "ready"}, {url: "prefill"})

    asyncio.run(story())


def test_a_proxy_that_was_started_anew_hears_of_the_replicas_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with behind_a_proxy(tmp_path) as (stand, proxy):
            known = dict(proxy.states)
            proxy.states.clear()
            await stand.planner.tick()
            assert proxy.states == known
            await stand.until("the proxy did not list it any more")

    asyncio.run(story())


def test_a_request_held_open_over_a_scale_down_finishes(tmp_path: Path) -> None:
    async def story() -> None:
        async with behind_a_proxy(tmp_path) as (stand, proxy):
            first, second = proxy.states
            proxy.in_flight = {first: 1, second: 3}  # the victim is the one with least in flight
            async with stand.session.get(f"{first}/work") as answer:
                assert await answer.content.readexactly(5) == b"first"
                _, outcome = await stand.planner.order(1)
                assert outcome.actions == (f"draining {first} with 1 requests in flight, then stopping it",)
                await stand.eventually(lambda: proxy.states.get(first) == "draining")
                await asyncio.sleep(0.2)  # many polls, none of which may stop it
                assert not stand.planner.parts.actuator._replicas[first].child.gone()  # type: ignore[attr-defined]
                await get(stand.session, f"{first}/release")
                assert await answer.content.readexactly(5) == b" last"
            proxy.in_flight[first] = 0
            await stand.until(f"stopped {first}")
            assert list(proxy.states) == [second]
            proxy.in_flight[second] = 0

    asyncio.run(story())


def test_a_prefill_worker_whose_kv_is_still_read_is_not_stopped(tmp_path: Path) -> None:
    """The proxy's count is zero as soon as the first token is out; the lease of the hand-off is longer."""

    async def story() -> None:
        async with behind_a_proxy(tmp_path) as (stand, proxy):
            victim, other = proxy.states
            proxy.in_flight = {other: 1}
            await get(stand.session, f"{victim}/lease")
            await stand.planner.order(1)
            await stand.eventually(lambda: proxy.states.get(victim) == "draining")
            await asyncio.sleep(0.2)  # many polls, none of which may stop it
            assert proxy.states[victim] == "draining"
            await get(stand.session, f"{victim}/lease")
            await stand.until(f"stopped {victim}")
            proxy.in_flight = {}

    asyncio.run(story())


def test_without_a_proxy_too_a_lease_is_waited_for(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, **actuate(tmp_path)) as stand:
            await stand.planner.order(2)
            await stand.eventually(lambda: two_ready(stand))
            urls = list(replicas(stand).states())
            for url in urls:
                await get(stand.session, f"{url}/lease")
            await stand.planner.order(1)
            victim = next(url for url, state in replicas(stand).states().items() if state == "draining")
            await asyncio.sleep(0.2)  # many polls, none of which may stop it
            assert replicas(stand).states()[victim] == "draining"
            assert not replicas(stand)._replicas[victim].child.gone()
            for url in urls:
                await get(stand.session, f"{url}/lease")
            await stand.until(f"stopped {victim}")

    asyncio.run(story())


def test_without_a_proxy_the_engines_own_gauges_are_waited_for(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, **actuate(tmp_path)) as stand:
            await stand.planner.order(2)
            await stand.eventually(lambda: two_ready(stand))
            url, busy = stand.planner.parts.actuator.states()
            async with stand.session.get(f"{url}/work") as one, stand.session.get(f"{busy}/work") as two:
                await one.content.readexactly(5)
                await two.content.readexactly(5)
                await stand.planner.order(1)
                victim = next(u for u, state in stand.planner.parts.actuator.states().items() if state == "draining")
                answer = one if victim == url else two
                await asyncio.sleep(0.2)
                await get(stand.session, f"{victim}/release")
                assert await answer.content.readexactly(5) == b" last"
                await stand.until(f"stopped {victim}")
                await get(stand.session, f"{busy if victim == url else url}/release")

    asyncio.run(story())


def test_a_drain_that_does_not_end_is_undone(tmp_path: Path) -> None:
    async def story() -> None:
        async with behind_a_proxy(tmp_path, drain_seconds=0.2) as (stand, proxy):
            proxy.in_flight = dict.fromkeys(proxy.states, 1)
            await stand.planner.order(1)
            line = await stand.until("kept http")
            assert "(drain_timeout)" in line
            assert set(proxy.states.values()) == {"ready"}
            assert "resume" in proxy.calls
            metrics = stand.planner.parts.metrics
            assert metrics.value("dynamo_planner_actuation_failures_total", reason="drain_timeout") == 1
            proxy.in_flight = {}

    asyncio.run(story())


@pytest.mark.parametrize("broken", ["drain", "remove"])
def test_a_proxy_that_fails_in_the_middle_is_asked_to_resume(tmp_path: Path, broken: str) -> None:
    async def story() -> None:
        async with behind_a_proxy(tmp_path) as (stand, proxy):
            proxy.broken.add(broken)
            await stand.planner.order(1)
            await stand.until("kept http")
            assert proxy.calls[-1] == "resume"
            assert set(proxy.states.values()) == {"ready"}
            proxy.broken.clear()

    asyncio.run(story())


def test_a_replica_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    async def story() -> None:
        settings = actuate(tmp_path, "ignore-sigterm", "grandchild", terminate_seconds=0.2)
        async with bench(tmp_path, **settings) as stand:
            await stand.planner.tick()
            url = url_in(await stand.until("ready http"))
            pid = replicas(stand)._replicas[url].child.pid
            await stand.planner.close()
            assert not group_alive(pid)
            assert "(sigterm_ignored)" in await stand.until("stopped http")

    asyncio.run(story())


def test_a_replica_that_never_gets_healthy_is_stopped_with_one_reason(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, **actuate(tmp_path, "sick", start_seconds=0.5)) as stand:
            await stand.planner.tick()
            pid = next(iter(replicas(stand)._replicas.values())).child.pid
            line = await stand.until("failed http")
            assert "(start_timeout)" in line
            assert not group_alive(pid)
            _, outcome = await stand.planner.tick()
            assert (outcome.accepted, outcome.reason) == (False, "backing_off")

    asyncio.run(story())


def test_a_replica_that_dies_at_once_says_its_last_words(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, **actuate(tmp_path, "dies")) as stand:
            await stand.planner.tick()
            line = await stand.until("failed http")
            assert "(start_exited): exited with code 1; last words: no such model: tiny; output in" in line

    asyncio.run(story())


def test_a_crash_takes_orphans_along_and_is_told_to_the_proxy(tmp_path: Path) -> None:
    async def story() -> None:
        async with behind_a_proxy(tmp_path, "grandchild", is_empty=True) as (stand, proxy):
            await stand.planner.tick()
            url = url_in(await stand.until("ready http"))
            pid = replicas(stand)._replicas[url].child.pid
            os.kill(pid, signal.SIGKILL)
            assert "(crashed): died of signal 9" in await stand.until("failed http")
            assert not group_alive(pid)
            assert proxy.states == {}

    asyncio.run(story())


def test_engines_that_the_planner_did_not_start_are_never_stopped(tmp_path: Path) -> None:
    async def story() -> None:
        async with behind_a_proxy(
            tmp_path,
            is_empty=True,
            proxy=FakeProxy(states={"http://127.0.0.1:9": "ready", "http://127.0.0.1:7": "ready"}),
        ) as (stand, proxy):
            _, outcome = await stand.planner.order(1)
            assert (outcome.accepted, outcome.reason) == (False, "no_victim")
            assert proxy.calls == []

    asyncio.run(story())


def test_ports_in_use_are_passed_over_and_a_full_range_is_said(tmp_path: Path) -> None:
    async def story() -> None:
        listener = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        taken = listener.sockets[0].getsockname()[1]
        async with listener:
            last = min(taken + 50, 65535)
            if last > taken:
                assert free_port((taken, last), used=()) > taken
            async with bench(tmp_path, **actuate(tmp_path, engine_port_range=f"{taken}-{taken}")) as stand:
                _, outcome = await stand.planner.order(3)
                assert (outcome.accepted, outcome.reason) == (False, "no_free_port")
                assert outcome.actions == (f"no free port in {taken}-{taken}; widen --engine-port-range",)

    asyncio.run(story())


def test_a_command_that_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ActuationError, match=r"cannot start '/nope': No such file"):
        ChildProcess("/nope --port {port}", 18150, tmp_path / "logs" / "x.log")


def test_closing_while_replicas_start_leaves_none(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, **actuate(tmp_path, "sick", "ignore-sigterm", terminate_seconds=0.2)) as stand:
            await stand.planner.order(3)
            pids = [replica.child.pid for replica in replicas(stand)._replicas.values()]
            await stand.planner.close()
            assert len(pids) == 3
            assert not any(group_alive(pid) for pid in pids)
        kinds = [json.loads(line)["kind"] for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
        assert kinds.count("actuation") == 3

    asyncio.run(story())


def test_a_need_that_comes_back_takes_the_drain_back_instead_of_starting_one_more(tmp_path: Path) -> None:
    async def story() -> None:
        async with behind_a_proxy(tmp_path) as (stand, proxy):
            before = {replica.child.pid for replica in replicas(stand)._replicas.values()}
            proxy.in_flight = dict.fromkeys(proxy.states, 1)
            await stand.planner.order(1)
            await stand.eventually(lambda: "draining" in proxy.states.values())
            decision, outcome = await stand.planner.order(2)
            assert (decision.current, outcome.reason) == (1, "kept")
            await stand.until("kept http")
            assert set(proxy.states.values()) == {"ready"}
            assert {replica.child.pid for replica in replicas(stand)._replicas.values()} == before
            proxy.in_flight = {}

    asyncio.run(story())


def test_an_order_that_meets_the_exit_starts_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, **actuate(tmp_path)) as stand:
            await stand.planner.close()
            _, outcome = await stand.planner.order(2)
            assert (outcome.accepted, outcome.reason) == (False, "stopping")
            assert not replicas(stand)._replicas

    asyncio.run(story())


def test_a_group_that_is_gone_is_never_signalled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = ChildProcess("true", 18150, tmp_path / "x.log")
    while not child.gone():
        time.sleep(0.01)
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "killpg", lambda group, number: signals.append((group, number)))
    assert child.gone()  # even though its number is in use again
    child.kill()
    child.terminate()
    assert signals == []


def test_a_rolling_restart_starts_the_new_one_before_the_old_one_goes(tmp_path: Path) -> None:
    async def story() -> None:
        async with behind_a_proxy(tmp_path, is_empty=True) as (stand, proxy):
            assert (await stand.planner.parts.actuator.restart()).reason == "no_victim"
            await stand.planner.order(2)
            await stand.eventually(lambda: two_ready(stand))
            old = {replica.child.pid for replica in replicas(stand)._replicas.values()}
            proxy.in_flight = dict.fromkeys(proxy.states, 1)
            assert (await stand.planner.parts.actuator.restart()).accepted
            await stand.eventually(lambda: "draining" in proxy.states.values())
            assert len(proxy.states) == 3, "the new one serves before the old one is drained"
            assert (await stand.planner.order(1))[1].reason == "restarting"
            proxy.in_flight = {}
            await stand.until("restarted")
            assert len(proxy.states) == 2
            assert not old & {replica.child.pid for replica in replicas(stand)._replicas.values()}

    asyncio.run(story())


def test_a_rolling_restart_whose_new_replica_dies_keeps_the_old_ones(tmp_path: Path) -> None:
    async def story() -> None:
        async with behind_a_proxy(tmp_path) as (stand, proxy):
            old = dict(proxy.states)
            plan = replicas(stand)._plan
            replicas(stand)._plan = replace(plan, command=child_command(tmp_path, "dies"))
            assert (await stand.planner.parts.actuator.restart()).accepted
            await stand.until("2 of 2 are not replaced")
            assert proxy.states == old

    asyncio.run(story())
