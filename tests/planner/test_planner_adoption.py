"""A planner that comes back goes on with the local replicas of the one that was killed; GPUs of local replicas."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from dynamo_planner.child_process import EngineProcess, group_alive
from dynamo_planner.config import load_config
from dynamo_planner.errors import ActuationError, ConfigError
from dynamo_planner.replica_record import Life, ReplicaRecord, birth_of, record_path, records

from tests.planner.planner_fakes import Bench, FakeProxy, bench, child_command, served
from tests.planner.test_planner_local import actuate, behind_a_proxy, get, replicas, two_ready, url_in
from tests.planner.test_planner_service import lived


def abandoned(stand: Bench) -> list[EngineProcess]:
    """What is left of a planner that was killed: its engines, and records that nobody holds."""
    actuator = replicas(stand)
    left = [replica.child for replica in actuator._replicas.values()]
    for task in actuator._tasks.values():
        task.cancel()
    for child in left:
        child.release()
    actuator._tasks.clear()
    actuator._replicas.clear()
    return left


@asynccontextmanager
async def beside(folder: Path, admin: str, *flags: str, **more: object) -> AsyncIterator[Bench]:
    """One of several planners, one after the other, of one proxy."""
    async with bench(folder, **actuate(folder, *flags, proxy_admin=admin, **more)) as stand:
        yield stand


async def successor_stops(folder: Path, admin: str, left: list[EngineProcess], says: str) -> None:
    """The next planner takes one replica over, says how it goes on, and leaves nothing behind."""
    async with beside(folder, admin, terminate_seconds=0.5) as stand:
        await stand.planner.tick()
        await stand.until("adopted http")
        await stand.until(says)
    assert all(child.gone() for child in left)


def test_a_planner_killed_beside_ready_replicas_is_followed_by_one_that_goes_on_with_them(tmp_path: Path) -> None:
    """Really killed: nothing is started anew, nothing is cut, and the successor may stop what it did not start."""

    async def story() -> None:
        proxy, command = FakeProxy(), child_command(tmp_path)
        same = ["--no-advisory", "--engine-command", command, "--engine-log-dir", str(tmp_path / "logs")]
        same += ["--engine-port-range", "18100-18199", "--min-replicas", "2"]
        async with served(proxy.app()) as admin:
            heard = await asyncio.to_thread(
                lived, [*same, "--proxy-admin", admin], lambda said: said.count("ready http") == 2, signal.SIGKILL
            )
            assert "adopted" not in heard
            first, second = proxy.states
            async with beside(tmp_path, admin, min_replicas=2) as stand:
                async with stand.session.get(f"{first}/work") as answer:
                    assert await answer.content.readexactly(5) == b"first"
                    decision, _ = await stand.planner.tick()
                    assert (decision.current, decision.desired) == (2, 2)
                    await stand.eventually(lambda: two_ready(stand))
                    assert list(proxy.states) == [first, second]
                    assert "register" not in proxy.calls[2:], "they are known there"
                    await get(stand.session, f"{first}/release")
                    assert await answer.content.readexactly(5) == b" last"
                pids = [replica.child.pid for replica in replicas(stand)._replicas.values()]
                assert not stand.planner.memory.startups, "taking over is no start-up"
        assert not any(map(group_alive, pids))
        assert proxy.states == {}
        assert not list((tmp_path / "logs").glob("*.json"))

    asyncio.run(story())


def test_a_drain_that_was_under_way_is_taken_back(tmp_path: Path) -> None:
    async def story() -> None:
        proxy = FakeProxy()
        async with served(proxy.app()) as admin:
            async with beside(tmp_path, admin) as stand:
                await stand.planner.order(2)
                await stand.eventually(lambda: two_ready(stand))
                victim, other = proxy.states
                proxy.in_flight = {victim: 1, other: 2}
                await stand.planner.order(1)
                await stand.eventually(lambda: proxy.states[victim] == "draining")
                left = abandoned(stand)
            async with beside(tmp_path, admin) as stand:
                await stand.planner.tick()
                await stand.eventually(lambda: two_ready(stand))
                assert set(proxy.states.values()) == {"ready"}
                proxy.in_flight = {}
        assert all(child.gone() for child in left)

    asyncio.run(story())


def test_a_replica_that_was_told_to_stop_is_seen_off_and_serves_nobody(tmp_path: Path) -> None:
    async def story() -> None:
        proxy = FakeProxy()
        async with served(proxy.app()) as admin:
            async with beside(tmp_path, admin, "ignore-sigterm") as stand:
                await stand.planner.order(1)
                url = url_in(await stand.until("ready http"))
                proxy.states["http://127.0.0.1:9"] = "ready"  # the minimum is there: none is started in its place
                replica = replicas(stand)._replicas[url]
                replica.order_stop()
                replicas(stand)._drive_anew(replica)
                await stand.eventually(lambda: replica.child.signalled)
                left = abandoned(stand)
            proxy.calls.clear()
            await successor_stops(tmp_path, admin, left, f"stopped {url} (sigterm_ignored)")
        assert not {"register", "resume"} & set(proxy.calls)

    asyncio.run(story())


def test_a_replica_that_died_while_no_planner_ran_is_told_to_the_proxy(tmp_path: Path) -> None:
    async def story() -> None:
        proxy = FakeProxy()
        async with served(proxy.app()) as admin:
            async with beside(tmp_path, admin) as stand:
                await stand.planner.order(1)
                url = url_in(await stand.until("ready http"))
                left = abandoned(stand)
            left[0].kill()
            await asyncio.to_thread(left[0]._process.wait)  # type: ignore[attr-defined]
            await successor_stops(tmp_path, admin, left, f"failed {url} (crashed)")
        assert url not in proxy.states

    asyncio.run(story())


def test_what_a_living_planner_has_started_is_left_to_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with behind_a_proxy(tmp_path), bench(tmp_path, **actuate(tmp_path)) as other:
            await other.planner.tick()
            await other.until("ready http")
            assert len(replicas(other)._replicas) == 1, "one of its own"
            assert not any("adopted" in line for line in other.said)

    asyncio.run(story())


def test_an_engine_behind_another_proxy_is_of_another_fleet(tmp_path: Path) -> None:
    """Two models may be served from one machine: with the same folder and ports, but not by one planner."""

    async def story() -> None:
        async with behind_a_proxy(tmp_path, is_empty=True) as (stand, _):
            await stand.planner.order(1)
            url = url_in(await stand.until("ready http"))
            left = abandoned(stand)
        async with behind_a_proxy(tmp_path, is_empty=True) as (stand, proxy):
            await stand.planner.tick()
            assert f"left {url} (other_fleet)" in await stand.until("left http")
            await stand.until("ready http")
            assert url not in proxy.states
        assert not left[0].gone()
        left[0].kill()
        await stand.eventually(left[0].gone)
        assert record_path(tmp_path / "logs", int(url[-5:])).exists()
        async with behind_a_proxy(tmp_path, is_empty=True) as (stand, _):
            await stand.planner.tick()
            await stand.until("ready http")
            assert not any(line.startswith("left") for line in stand.said), "there is none any more"

    asyncio.run(story())


def test_a_number_that_belongs_to_somebody_else_by_now_is_never_signalled(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, **actuate(tmp_path)) as stand:
            await stand.planner.tick()
            await stand.until("failed http://127.0.0.1:18100 (crashed)")

    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        (tmp_path / "logs").mkdir()
        command = child_command(tmp_path)
        life = Life(18100, sleeper.pid, "another boot/1", command, command)
        record = ReplicaRecord.write(record_path(tmp_path / "logs", 18100), life)
        assert record is not None
        record.release()
        asyncio.run(story())
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"port": 1}', b'{"gpus": 3}', b"\xff"])
def test_a_record_that_nobody_can_read_is_passed_over(content: bytes, tmp_path: Path) -> None:
    record_path(tmp_path, 18100).write_bytes(content)
    assert list(records(tmp_path, (18100, 18101))) == []


def test_a_dead_process_has_no_birth_and_a_living_one_keeps_its_own() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    birth = birth_of(child.pid)
    assert birth is not None
    assert birth_of(child.pid) == birth
    child.kill()
    child.wait()
    assert child.stdin is not None
    child.stdin.close()
    assert birth_of(child.pid) != birth


def visible(child: EngineProcess) -> str:
    entries = Path("/proc", str(child.pid), "environ").read_bytes().split(b"\0")
    return next(entry[21:].decode() for entry in entries if entry.startswith(b"CUDA_VISIBLE_DEVICES="))


def last_word(child: EngineProcess) -> str:
    return Path("/proc", str(child.pid), "cmdline").read_text().split("\0")[-2]


def test_each_replica_sees_gpus_of_its_own_and_gives_them_back(tmp_path: Path) -> None:
    async def story() -> None:
        gpus = {"engine_gpus": "0-3,GPU-ab", "gpus_per_replica": 2}
        async with bench(tmp_path, **actuate(tmp_path, **gpus) | {"max_replicas": 2}) as stand:
            _, outcome = await stand.planner.order(2)
            assert "GPU 0,1, output" in outcome.actions[0]
            await stand.eventually(lambda: two_ready(stand))
            seen = {replica.child.pid: visible(replica.child) for replica in replicas(stand)._replicas.values()}
            assert set(seen.values()) == {"0,1", "2,3"}
            with pytest.raises(ActuationError, match="1 of 5 GPUs are free and a replica needs 2"):
                replicas(stand)._free_gpus()
            outcome = await replicas(stand).restart()  # needs one more than there are GPUs for
            await stand.until("no_free_gpu")
            assert len(replicas(stand)._replicas) == 2
            await stand.planner.order(1)
            await stand.until("stopped http")
            (kept,) = replicas(stand)._replicas.values()
            left = abandoned(stand)
        async with bench(tmp_path, **actuate(tmp_path, **gpus) | {"max_replicas": 2}) as stand:
            await stand.planner.tick()
            await stand.until("ready http")
            assert [gpu for gpu in "0123" if gpu not in kept.gpus] == list(replicas(stand)._free_gpus())
        assert all(child.gone() for child in left)

    asyncio.run(story())


def test_a_command_may_name_its_gpus_and_further_ports(tmp_path: Path) -> None:
    """As `docker run --gpus device={gpus}` wants it."""

    async def story() -> None:
        settings = actuate(tmp_path, "{gpus}/{port+1000}", engine_gpus=[4, "6"]) | {"max_replicas": 2}
        async with bench(tmp_path, **settings) as stand:
            await stand.planner.order(2)
            for gpu, (url, replica) in zip("46", replicas(stand)._replicas.items(), strict=True):
                assert last_word(replica.child) == f"{gpu}/{int(url[-5:]) + 1000}"

    asyncio.run(story())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"engine_gpus": "0,1", "max_replicas": 3}, "3 replicas take 3 GPUs but engine_gpus names 2"),
        ({"engine_gpus": "0", "gpus_per_replica": 2}, "1 replicas take 2 GPUs but engine_gpus names 1"),
        ({"engine_gpus": "0-1,1"}, "GPU 1 is named twice"),
        ({"engine_gpus": "all"}, "'all' is no GPU; write them as 0-7"),
        ({"engine_gpus": "3-1"}, "'3-1' is no GPU"),
        ({"engine_gpus": "0", "engine_command": None, "scale_command": "true"}, "give engine_command too"),
        (
            {"pools": {"a": {"engine_gpus": "0-3", "engine_port_range": "1-9"}, "b": {"engine_gpus": "3"}}},
            "pools a and b both have GPU 3",
        ),
    ],
)
def test_gpus_that_contradict_are_refused(settings: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, actuate(tmp_path) | {"max_replicas": None} | settings).by_pool()
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_there_are_never_more_replicas_than_gpus_for_them(tmp_path: Path) -> None:
    settings = actuate(tmp_path, engine_gpus="0-2") | {"max_replicas": None}
    config = load_config(None, settings)
    assert config.policy().max_replicas == 3
    assert config.policy().max_replicas * config.gpus_per_replica == len(config.engine_gpus)
