"""The Kubernetes actuator on a fake API: counting, drains that lose nothing, races, refusals, leases and restarts."""

from __future__ import annotations

import asyncio
import time

import aiohttp
import pytest
from dynamo_planner.errors import ObservationError
from dynamo_planner.replica import Limits

from tests.planner.fake_kubernetes import COST, FakeCluster
from tests.planner.kubernetes_stand import LEASE_SECONDS, hands, stand
from tests.planner.planner_fakes import FakeProxy, served


@pytest.mark.parametrize("plural", ["deployments", "statefulsets"])
def test_up_registers_down_drains_the_right_one(plural: str) -> None:
    async def story() -> None:
        cluster = FakeCluster(plural)
        async with stand(cluster) as here:
            await here.look()
            outcome = await here.scale(1, 3)
            assert (outcome.accepted, cluster.replicas) == (True, 3)
            await here.look()
            assert here.states() == ["ready"] * 3
            assert set(here.proxy.states) == set(here.actuator.states())
            busiest, middle, least = sorted(here.proxy.states)
            here.proxy.in_flight = {busiest: 5, middle: 3, least: 1}
            outcome = await here.scale(3, 2)
            assert outcome.reason == "draining"
            await here.eventually(lambda: "draining" in here.proxy.states.values())
            victim = next(url for url, state in here.proxy.states.items() if state == "draining")
            assert cluster.replicas == 3, "nothing is ordered while something is in flight"
            assert here.actuator.states()[victim] == "draining"
            if plural == "deployments":
                assert victim == least
            here.proxy.in_flight[victim] = 0
            await here.eventually(lambda: cluster.replicas == 2)
            assert await here.until("stopped") == ""
            await here.look()
            assert set(here.actuator.states()) == {busiest, middle, least} - {victim} == set(here.proxy.states)

    asyncio.run(story())


def test_a_drain_that_does_not_end_is_undone_and_unmarked() -> None:
    async def story() -> None:
        cluster = FakeCluster(replicas=2)
        async with stand(cluster, Limits(drain_seconds=0.1, resume_seconds=20, poll_seconds=0.01)) as here:
            await here.look()
            here.proxy.in_flight = dict.fromkeys(here.proxy.states, 1)
            await here.scale(2, 1)
            assert await here.until("kept") == "drain_timeout"
            assert cluster.replicas == 2
            assert set(here.proxy.states.values()) == {"ready"}
            assert not any(pod["metadata"].get("annotations") for pod in cluster.pods.values())

    asyncio.run(story())


def test_a_need_that_comes_back_takes_the_drain_back() -> None:
    async def story() -> None:
        cluster = FakeCluster(replicas=2)
        async with stand(cluster) as here:
            await here.look()
            here.proxy.in_flight = dict.fromkeys(here.proxy.states, 1)
            await here.scale(2, 1)
            await here.eventually(lambda: "draining" in here.proxy.states.values())
            assert (await here.scale(1, 2)).reason == "kept"
            assert await here.until("kept") == ""
            assert cluster.replicas == 2

    asyncio.run(story())


def test_when_another_pod_goes_the_victim_serves_on() -> None:
    """As on clusters before 1.22, which know no deletion cost."""

    async def story() -> None:
        cluster = FakeCluster(replicas=3)
        async with stand(cluster) as here:
            await here.look()
            here.proxy.in_flight = dict.fromkeys(here.proxy.states, 1)
            await here.scale(3, 2)
            await here.eventually(lambda: "draining" in here.proxy.states.values())
            victim = next(url for url, state in here.proxy.states.items() if state == "draining")
            for pod in cluster.pods.values():  # the cluster does not see the mark
                pod["metadata"].get("annotations", {}).pop(COST, None)
                if victim not in f"http://{pod['status']['podIP']}:8000":
                    pod["metadata"]["annotations"] = {COST: "-1"}
            here.proxy.in_flight[victim] = 0
            assert await here.until("kept") == "wrong_victim"
            assert here.proxy.states[victim] == "ready"
            assert cluster.replicas == 2

    asyncio.run(story())


def test_races_on_the_scale_are_looked_at_again_and_edits_are_kept() -> None:
    async def story() -> None:
        cluster = FakeCluster()
        async with stand(cluster) as here:
            await here.look()
            cluster.conflicts = 2  # the status moved while we wrote
            assert (await here.scale(1, 2)).accepted
            await here.look()
            cluster.conflicts = 9
            assert (await here.scale(2, 3)).reason == "conflict"
            cluster.conflicts, cluster.replicas = 0, 5  # kubectl scale
            outcome = await here.scale(2, 3)
            assert (outcome.accepted, outcome.reason, cluster.replicas) == (False, "edited", 5)
            here.actuator.happenings()
            cluster.reconcile()
            assert (await here.actuator.refresh()).is_edited
            assert [event.what for event in here.actuator.happenings() if event.what == "adopted"] == ["adopted"]
            assert not (await here.actuator.refresh()).is_edited

    asyncio.run(story())


@pytest.mark.parametrize("refused", ["GET scale", "GET pods", "PUT scale", "GET planner"])
def test_a_refusal_names_the_manifest_and_changes_nothing(refused: str) -> None:
    async def story() -> None:
        cluster = FakeCluster(forbidden={refused})
        async with stand(cluster) as here:
            if refused == "PUT scale":
                await here.look()
                outcome = await here.scale(1, 2)
                assert (outcome.accepted, outcome.reason) == (False, "forbidden")
                assert "rbac.yaml" in outcome.actions[0]
            else:
                with pytest.raises(ObservationError, match=r"403.*rbac\.yaml"):
                    await here.look()
                assert not (await here.scale(1, 2)).accepted
            assert cluster.replicas == 1

    asyncio.run(story())


def test_a_mark_that_is_refused_stops_the_scale_down() -> None:
    async def story() -> None:
        cluster = FakeCluster(replicas=2)
        async with stand(cluster) as here:
            await here.look()
            cluster.forbidden = {f"PATCH {name}" for name in cluster.pods}
            await here.scale(2, 1)
            assert "forbidden" in await here.until("kept")
            assert cluster.replicas == 2
            assert set(here.proxy.states.values()) == {"ready"}

    asyncio.run(story())


def test_pods_that_stay_pending_stop_counting_and_are_not_ordered_twice() -> None:
    async def story() -> None:
        cluster = FakeCluster()
        async with stand(cluster) as here:
            await here.look()
            cluster.stuck = True
            await here.scale(1, 3)
            await here.look()
            assert here.states() == ["ready", "starting", "starting"]
            here.ahead = 150.0
            await here.look()
            assert here.states() == ["down", "down", "ready"]
            assert (await here.scale(1, 3)).reason == "ordered_already"
            assert (await here.scale(1, 4)).accepted
            assert cluster.replicas == 4
            cluster.reconcile()
            await here.actuator.refresh()
            assert (await here.scale(2, 1)).accepted  # nothing serves in what is given up: no drain
            await here.eventually(lambda: cluster.replicas == 1)

    asyncio.run(story())


def test_only_the_holder_of_the_lease_writes() -> None:
    async def story() -> None:
        cluster, proxy = FakeCluster(), FakeProxy()
        async with served(cluster.app()) as api, served(proxy.app()) as admin, aiohttp.ClientSession() as session:
            one = await hands(cluster, proxy, session, (api, admin), name="one")
            two = await hands(cluster, proxy, session, (api, admin), name="two")
            await one.look()
            await two.look()
            assert (await two.scale(1, 2)).reason == "not_the_writer"
            assert (await one.scale(1, 2)).accepted
            two.ahead = LEASE_SECONDS + 1  # it sees no renewal for that long
            await two.look()
            assert (await two.scale(2, 3)).accepted
            assert (await one.scale(2, 9)).accepted is False, "the old holder learns of the new count first"
            await one.look()
            assert (await one.scale(3, 9)).reason == "not_the_writer"
            await two.actuator.close()  # it lets go: the other one need not wait
            await one.look()
            assert (await one.scale(3, 4)).accepted
            await one.actuator.close()

    asyncio.run(story())


def test_a_lease_lost_during_a_drain_undoes_it() -> None:
    async def story() -> None:
        cluster = FakeCluster(replicas=2)
        async with stand(cluster) as here:
            await here.look()
            here.proxy.in_flight = dict.fromkeys(here.proxy.states, 1)
            await here.scale(2, 1)
            await here.eventually(lambda: "draining" in here.proxy.states.values())
            cluster.leases["planner"]["spec"]["holderIdentity"] = "other"
            cluster.leases["planner"]["metadata"]["resourceVersion"] = cluster.bump()
            await here.look()
            here.proxy.in_flight = {}
            assert await here.until("kept") == "not_the_writer"
            assert cluster.replicas == 2
            assert set(here.proxy.states.values()) == {"ready"}

    asyncio.run(story())


def test_what_a_killed_planner_left_draining_serves_again() -> None:
    async def story() -> None:
        cluster, proxy = FakeCluster(replicas=2), FakeProxy()
        async with served(cluster.app()) as api, served(proxy.app()) as admin, aiohttp.ClientSession() as session:
            dead = await hands(cluster, proxy, session, (api, admin))
            await dead.look()
            proxy.in_flight = dict.fromkeys(proxy.states, 1)
            await dead.scale(2, 1)
            await dead.eventually(lambda: "draining" in proxy.states.values())
            dead.actuator.kill_now()  # as SIGKILL would: nothing is undone
            await dead.eventually(lambda: not dead.actuator.happenings() and "draining" not in dead.states())
            assert "draining" in proxy.states.values()
            heir = await hands(cluster, proxy, session, (api, admin))
            await heir.look()
            assert set(proxy.states.values()) == {"ready"}
            assert not any(pod["metadata"].get("annotations") for pod in cluster.pods.values())
            await heir.actuator.close()

    asyncio.run(story())


@pytest.mark.parametrize("plural", ["deployments", "statefulsets"])
def test_a_rolling_restart_replaces_every_pod_drained(plural: str) -> None:
    async def story() -> None:
        cluster = FakeCluster(plural, replicas=3)
        async with stand(cluster) as here:
            await here.look()
            old = set(here.actuator.states())
            slow = sorted(old)[0]
            here.proxy.in_flight = {slow: 1}
            assert (await here.actuator.restart()).accepted
            assert (await here.actuator.restart()).reason == "restarting"
            assert (await here.scale(3, 4)).reason == "restarting"
            await here.eventually(lambda: "draining" in here.proxy.states.values())
            told: list[str] = []
            end, fewest = time.monotonic() + 30.0, 3
            while "restarted" not in told:
                assert time.monotonic() < end, cluster.calls[-20:]
                cluster.vanish()
                await here.look()
                fewest = min(fewest, here.states().count("ready"))
                if here.proxy.states.get(slow) == "draining":
                    assert slow in here.actuator.states(), "deleted with a request in flight"
                    here.proxy.in_flight = {}
                told += [event.what for event in here.actuator.happenings()]
                await asyncio.sleep(0.01)
            await here.look()
            assert not old & set(here.actuator.states())
            assert set(here.proxy.states) == set(here.actuator.states())
            assert cluster.replicas == 3
            assert fewest >= 2, "two of three must always serve"

    asyncio.run(story())


def test_a_restart_that_stalls_ends_and_the_only_pod_is_not_restarted() -> None:
    async def story() -> None:
        cluster = FakeCluster(replicas=2)
        limits = Limits(drain_seconds=0.1, resume_seconds=20, poll_seconds=0.01)
        async with stand(cluster, limits) as here:
            await here.look()
            here.proxy.in_flight = dict.fromkeys(here.proxy.states, 1)
            assert (await here.actuator.restart()).accepted
            assert await here.until("failed") == "drain_timeout"
            assert set(here.proxy.states.values()) == {"ready"}
            cluster.replicas = 1
            cluster.reconcile()
            cluster.vanish()
            await here.look()
            assert (await here.actuator.restart()).reason == "too_few"

    asyncio.run(story())
