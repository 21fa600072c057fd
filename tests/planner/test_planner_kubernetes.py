"""The Kubernetes actuator on a fake API: counting, drains that lose nothing, races, refusals, leases and restarts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from dynamo_planner.actuator import Outcome
from dynamo_planner.config import PlannerConfig
from dynamo_planner.decision_log import DecisionLog
from dynamo_planner.errors import ConfigError, ObservationError
from dynamo_planner.fleet import Fleet
from dynamo_planner.kube_access import KubeAccess, find_access
from dynamo_planner.kube_actuator import KubernetesActuator, KubeSettings
from dynamo_planner.kube_client import KubeClient
from dynamo_planner.kube_lease import WriterLease
from dynamo_planner.kube_target import parse_target, pod_of
from dynamo_planner.peers import Peers, ProxyAdmin
from dynamo_planner.replica import Limits, Surroundings
from dynamo_planner.service import build_fleet
from dynamo_planner.wall_clock import WallClock

from tests.planner.fake_kubernetes import COST, FakeCluster
from tests.planner.planner_fakes import FakeEngine, FakeProxy, served, vllm_text

QUICK = Limits(drain_seconds=20.0, terminate_seconds=20.0, resume_seconds=20.0, poll_seconds=0.01)
LEASE_SECONDS = 30.0


@dataclass
class Stand:
    """One planner's hands on a fake cluster. `ahead` moves its clock."""

    cluster: FakeCluster
    proxy: FakeProxy
    actuator: KubernetesActuator
    ahead: float = 0.0

    def clock(self) -> float:
        return time.monotonic() + self.ahead

    def states(self) -> list[str]:
        return sorted(self.actuator.states().values())

    async def look(self) -> None:
        self.cluster.reconcile()
        await self.actuator.refresh()
        self.actuator.check()

    async def scale(self, current: int, desired: int) -> Outcome:
        return await self.actuator.apply(current, desired, False)

    async def eventually(self, true: Callable[[], object], limit_seconds: float = 20.0) -> None:
        end = time.monotonic() + limit_seconds
        while not true():
            assert time.monotonic() < end, f"it never came; {self.cluster.calls[-20:]}, {self.actuator.states()}"
            await asyncio.sleep(0.01)

    async def until(self, what: str) -> str:
        """Wait for a happening, the kubelet at work; returns its reason."""
        end = time.monotonic() + 20.0
        while time.monotonic() < end:
            self.cluster.vanish()
            for event in self.actuator.happenings():
                if event.what == what:
                    return event.reason
            await asyncio.sleep(0.01)
        raise AssertionError(f"nothing was {what}; {self.cluster.calls[-20:]}")


@asynccontextmanager
async def stand(cluster: FakeCluster, limits: Limits = QUICK, name: str = "one") -> AsyncIterator[Stand]:
    proxy = FakeProxy()
    async with served(cluster.app()) as api, served(proxy.app()) as admin, aiohttp.ClientSession() as session:
        made = await hands(cluster, proxy, session, (api, admin), limits, name)
        try:
            yield made
        finally:
            cluster.mood = "ok"
            await made.actuator.close()
            made.actuator.check()


async def hands(
    cluster: FakeCluster,
    proxy: FakeProxy,
    session: aiohttp.ClientSession,
    urls: tuple[str, str],
    limits: Limits = QUICK,
    name: str = "one",
) -> Stand:
    made: Stand

    def clock() -> float:
        return made.clock()

    peers = Peers(session, 5.0)
    around = Surroundings(peers, ProxyAdmin(peers, urls[1]), limits, clock, asyncio.sleep)
    client = KubeClient(session, KubeAccess(urls[0], "default", lambda: "secret", None), 5.0)
    lease = WriterLease(client, "default", "planner", name, LEASE_SECONDS)
    target = parse_target(f"{cluster.plural.removesuffix('s')}/vllm", "default")
    actuator = KubernetesActuator(KubeSettings(target, 8000, 100.0), client, lease, around, WallClock())
    made = Stand(cluster, proxy, actuator)
    return made


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
            task = dead.actuator._stopping
            assert task is not None
            dead.actuator.kill_now()  # as SIGKILL would: nothing is undone
            await asyncio.gather(task, return_exceptions=True)
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


@asynccontextmanager
async def planned(cluster: FakeCluster, folder: Path, **settings: object) -> AsyncIterator[tuple[Fleet, FakeEngine]]:
    """A whole planner on the fake cluster; every pod's engine is one server on all loopback addresses."""
    engine = FakeEngine()
    runner = web.AppRunner(engine.app(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", 0).start()
    async with served(cluster.app()) as api, aiohttp.ClientSession() as session:
        kubeconfig = folder / "kubeconfig"
        kubeconfig.write_text(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n"
            f"clusters: [{{name: k, cluster: {{server: '{api}'}}}}]\n"
            "users: [{name: u, user: {token: secret}}]\ncontexts: [{name: c, context: {cluster: k, user: u}}]\n"
        )
        config = PlannerConfig.model_validate(
            {
                "advisory": False,
                "kubernetes": f"{cluster.plural.removesuffix('s')}/vllm",
                "kubeconfig": kubeconfig,
                "pod_port": runner.addresses[0][1],
                "interval_seconds": 5,
                "poll_seconds": 0.01,
                "stabilisation_seconds": 0,
                "down_period_seconds": 0,
            }
            | settings
        )
        fleet = build_fleet(config, session, DecisionLog(None), lambda text: None)
        try:
            yield fleet, engine
        finally:
            cluster.mood = "ok"
            await fleet.close()
            fleet.check()
            await runner.cleanup()


def test_the_planner_holds_while_the_api_is_down_and_goes_on_after(tmp_path: Path) -> None:
    async def story() -> None:
        cluster = FakeCluster(replicas=3)
        cluster.reconcile()
        async with planned(cluster, tmp_path) as (fleet, engine):
            engine.text = vllm_text(running=0, kv=0.0)
            cluster.mood = "down"
            decision, _ = (await fleet.tick())["default"]
            assert (decision.reason, decision.desired) == ("fleet_unknown", 0)
            cluster.mood = "ok"
            decision, outcome = (await fleet.tick())["default"]
            assert (decision.current, decision.desired, outcome.reason) == (3, 2, "draining")
            cluster.mood = "down"
            for _ in range(3):  # busy or idle: nothing is done blind
                engine.text = vllm_text(running=9, waiting=99, kv=0.99)
                decision, outcome = (await fleet.tick())["default"]
                assert (decision.direction, decision.reason) == ("hold", "fleet_unknown")
            cluster.mood = "ok"
            assert fleet.first.parts.metrics.value(
                "dynamo_planner_observation_failures_total", reason="api_unreachable"
            )

    asyncio.run(story())


def test_an_edit_by_hand_gets_a_window_of_its_own(tmp_path: Path) -> None:
    async def story() -> None:
        cluster = FakeCluster(replicas=1)
        cluster.reconcile()
        async with planned(cluster, tmp_path, stabilisation_seconds=300) as (fleet, engine):
            engine.text = vllm_text(running=0, kv=0.0)
            await fleet.tick()
            fleet.first.memory = fleet.first.memory.__class__(since_seconds=0.0)  # a window long full
            cluster.replicas = 4
            cluster.reconcile()
            decision, _ = (await fleet.tick())["default"]
            assert (decision.current, decision.desired, decision.reason) == (4, 4, "stabilising")

    asyncio.run(story())


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("deployment/vllm", "/apis/apps/v1/namespaces/n/deployments/vllm/scale"),
        ("StatefulSets/a-b", "/apis/apps/v1/namespaces/n/statefulsets/a-b/scale"),
        ("lws/x", None),
        ("leaderworkerset/x", "/apis/leaderworkerset.x-k8s.io/v1/namespaces/n/leaderworkersets/x/scale"),
        ("things.v1beta1.example.com/x", "/apis/example.com/v1beta1/namespaces/n/things/x/scale"),
        ("deployment", None),
        ("deployment/", None),
        ("deployment/../secrets", None),
        ("things.example.com/x", None),
    ],
)
def test_targets(text: str, path: str | None) -> None:
    if path is None:
        with pytest.raises(ValueError, match="write deployment/NAME"):
            parse_target(text, "n")
    else:
        assert parse_target(text, "n").path == path


def test_groups_count_by_their_leaders() -> None:
    labels = {"leaderworkerset.sigs.k8s.io/worker-index": "1", "leaderworkerset.sigs.k8s.io/group-index": "3"}
    pod = {"metadata": {"name": "d-3-1", "labels": labels}, "status": {"podIP": "10.0.0.9"}}
    assert pod_of(pod, 8000, True) is None
    labels["leaderworkerset.sigs.k8s.io/worker-index"] = "0"
    leader = pod_of(pod, 8000, True)
    assert leader is not None
    assert (leader.ordinal, leader.url, leader.is_ready) == (3, "http://10.0.0.9:8000", False)


def test_ways_into_the_cluster_that_do_not_work_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="--kubeconfig"):
        find_access(None)
    for content, says in (
        ("", "no kubeconfig"),
        ("a: [", "no kubeconfig"),
        ("users: [{name: u, user: {exec: {command: aws}}}]", "no kubeconfig"),
    ):
        (tmp_path / "k").write_text(content)
        with pytest.raises(ConfigError, match=says):
            find_access(tmp_path / "k")
    parts = "current-context: c\ncontexts: [{name: c, context: {cluster: k, user: u}}]\n"
    (tmp_path / "k").write_text(
        parts + "clusters: [{name: k, cluster: {server: 'http://a'}}]\nusers: [{name: u, user: {exec: {command: aws}}}]"
    )
    with pytest.raises(ConfigError, match="token or a client certificate"):
        find_access(tmp_path / "k")
    account = tmp_path / "account"
    account.mkdir()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(ConfigError, match="service account"):
        find_access(None, account)
