"""The planner's Kubernetes side against a real API server: `make test-kubernetes` runs this with pytest.

A fake kubelet makes the pods true, a fake proxy counts what is in flight; API server, controllers, RBAC and etcd are
real. The planner logs in with nothing but rbac.yaml.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from dynamo_planner.errors import ObservationError
from dynamo_planner.kube_access import find_access
from dynamo_planner.kube_actuator import KubernetesActuator
from dynamo_planner.kube_client import KubeClient
from dynamo_planner.kube_lease import WriterLease
from dynamo_planner.kube_target import KubeSettings, parse_target
from dynamo_planner.peers import Peers, ProxyAdmin
from dynamo_planner.replica import Limits, Surroundings
from dynamo_planner.wall_clock import WallClock

from planner_sidecar.kubernetes.cluster import PODS, RUN, Cluster, cluster, workload
from tests.planner.planner_fakes import FakeProxy, served

LIMITS = Limits(
    drain_seconds=60,
    terminate_seconds=60,
    resume_seconds=30,
    start_seconds=60,
    lease_seconds=0,  # no engine answers here that could say that its leases are over
    poll_seconds=0.05,
)


@dataclass
class Stand:
    cluster: Cluster
    proxy: FakeProxy
    actuator: KubernetesActuator
    client: KubeClient
    path: str
    ahead: list[float]

    async def until(self, true: Callable[[], bool], what: str, looks: bool = True) -> None:
        end = time.monotonic() + 90
        while not true():
            assert time.monotonic() < end, f"{what} never came: {self.actuator.states()}, {self.proxy.calls[-9:]}"
            await self.cluster.kubelet()
            if looks:
                await self.actuator.refresh()
            self.actuator.check()
            await asyncio.sleep(0.05)

    async def ready(self, count: int) -> None:
        await self.until(lambda: sorted(self.actuator.states().values()) == ["ready"] * count, f"{count} ready pods")

    async def answers(self) -> None:
        """Wait until the API can be read again."""
        end = time.monotonic() + 90
        while True:
            try:
                await self.actuator.refresh()
                return
            except ObservationError:
                assert time.monotonic() < end, "the API server never answers again"
                await asyncio.sleep(0.2)

    async def told(self, word: str) -> str:
        heard: list[Any] = []

        def has() -> bool:
            heard.extend(self.actuator.happenings())
            return any(event.what == word for event in heard)

        await self.until(has, word)
        return next(event.reason for event in heard if event.what == word)


@asynccontextmanager
async def stand(kind: str, replicas: int, name: str) -> AsyncIterator[Stand]:
    async with cluster() as made:
        plural = {"Deployment": "deployments", "StatefulSet": "statefulsets", "LeaderWorkerSet": "leaderworkersets"}[
            kind
        ]
        group = "leaderworkerset.x-k8s.io" if kind == "LeaderWorkerSet" else "apps"
        base = f"/apis/{group}/v1/namespaces/default/{plural}"
        body = workload(kind, name, replicas)
        if kind == "LeaderWorkerSet":
            body = {
                "apiVersion": f"{group}/v1",
                "kind": kind,
                "metadata": {"name": name},
                "spec": {"replicas": replicas},
            }
            await _until_served(made, base)
            made.groups.append(f"{base}/{name}")
        await made.must("POST", base, body)
        proxy = FakeProxy()
        async with served(proxy.app()) as admin, aiohttp.ClientSession() as session:
            client = KubeClient(session, find_access(RUN / "planner.kubeconfig"), 5.0)
            ahead = [0.0]
            actuator = hands(client, session, admin, (kind, name), ahead)
            here = Stand(made, proxy, actuator, client, f"{base}/{name}", ahead)
            try:
                yield here
            finally:
                await actuator.close()
                await made.ask("DELETE", here.path, {"propagationPolicy": "Background"})
                end = time.monotonic() + 60
                while (await made.must("GET", PODS))["items"] and time.monotonic() < end:
                    await made.kubelet()


async def _until_served(made: Cluster, base: str) -> None:
    end = time.monotonic() + 60
    while (await made.ask("GET", base))[0] != 200:
        assert time.monotonic() < end, "the custom resource is never served"
        await asyncio.sleep(0.1)


def hands(
    client: KubeClient, session: aiohttp.ClientSession, admin: str, what: tuple[str, str], ahead: list[float]
) -> KubernetesActuator:
    def clock() -> float:
        return time.monotonic() + ahead[0]

    around = Surroundings(Peers(session, 2.0), ProxyAdmin(Peers(session, 2.0), admin), LIMITS, clock, asyncio.sleep)
    kind, name = what
    lease = WriterLease(client, "default", f"lease-{name}", f"planner-{id(ahead)}", 30.0)
    target = parse_target(f"{kind.lower()}/{name}", "default")
    return KubernetesActuator(KubeSettings(target, 8000, 100.0), client, lease, around, WallClock())


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet", "LeaderWorkerSet"])
def test_up_and_drained_down_with_the_manifests_rights(kind: str) -> None:
    async def story() -> None:
        async with stand(kind, 1, f"updown-{kind.lower()}") as here:
            await here.ready(1)
            outcome = await here.actuator.apply(1, 4, False)
            assert outcome.accepted, outcome
            await here.ready(4)
            assert len(here.proxy.states) == 4
            here.proxy.in_flight = dict.fromkeys(here.proxy.states, 1)
            assert (await here.actuator.apply(4, 3, False)).accepted
            await here.until(lambda: "draining" in here.proxy.states.values(), "a drain", looks=False)
            assert await here.cluster.replicas(here.path) == 4, "nothing is ordered while something is in flight"
            here.proxy.in_flight = {}
            if kind != "Deployment":
                assert await here.told("stopped") == ""  # on its way out; it may be in sight for a moment more
                await here.ready(3)
                assert max(here.actuator._pods) == f"updown-{kind.lower()}-2", "the highest ordinal had to go"
            else:  # 1.20 knows no deletion cost: the victim may live on, and then it must serve again
                await here.until(lambda: len(here.actuator.states()) == 3, "three pods")
                await here.ready(3)
            await here.until(lambda: set(here.proxy.states) == set(here.actuator.states()), "the proxy's list")
            assert set(here.proxy.states.values()) == {"ready"}

    asyncio.run(story())


def test_a_set_sleeps_at_zero_and_wakes() -> None:
    async def story() -> None:
        async with stand("StatefulSet", 2, "sleep") as here:
            await here.ready(2)
            here.proxy.in_flight = dict.fromkeys(here.proxy.states, 1)
            assert (await here.actuator.apply(2, 0, False)).accepted
            await here.until(lambda: "draining" in here.proxy.states.values(), "a drain", looks=False)
            assert await here.cluster.replicas(here.path) == 2, "nothing is ordered while something is in flight"
            here.proxy.in_flight = {}
            await here.told("stopped")
            await here.ready(0)
            assert (await here.cluster.replicas(here.path), here.proxy.states) == (0, {})
            assert (await here.actuator.apply(0, 1, False)).accepted
            await here.ready(1)
            assert list(here.proxy.states.values()) == ["ready"]

    asyncio.run(story())


def test_races_edits_and_stuck_pods() -> None:
    async def story() -> None:
        async with stand("Deployment", 2, "races") as here:
            await here.ready(2)
            scale = await here.client.get_scale(here.actuator._settings.target)
            scale["spec"]["replicas"] = 3
            patch = {"metadata": {"annotations": {"touched": "1"}}}
            await here.cluster.must("PATCH", here.path, patch, "application/merge-patch+json")
            with pytest.raises(Exception, match="409"):
                await here.client.put_scale(here.actuator._settings.target, scale)
            assert (await here.actuator.apply(2, 3, False)).accepted, "the count had not moved"
            await here.ready(3)
            edit = {"spec": {"replicas": 2}}
            await here.cluster.must("PATCH", here.path + "/scale", edit, "application/merge-patch+json")
            assert (await here.actuator.apply(3, 4, False)).reason == "edited"
            assert (await here.actuator.refresh()).is_edited
            await here.ready(2)
            here.cluster.stuck = True
            assert (await here.actuator.apply(2, 4, False)).accepted
            await here.until(lambda: sorted(here.actuator.states().values()).count("starting") == 2, "pending pods")
            here.ahead[0] = 150.0
            await here.actuator.refresh()
            assert sorted(here.actuator.states().values()) == ["down", "down", "ready", "ready"]
            assert (await here.actuator.apply(2, 3, False)).reason == "ordered_already"

    asyncio.run(story())


def test_rights_that_are_missing_are_named() -> None:
    async def story() -> None:
        role = "/apis/rbac.authorization.k8s.io/v1/namespaces/default/roles/dynamo-planner"
        async with stand("Deployment", 1, "rights") as here:
            await here.ready(1)
            whole = await here.cluster.must("GET", role)
            for rule, verb in ((0, "update"), (0, "get"), (2, "list"), (3, "update")):
                less = json.loads(json.dumps(whole))
                less["rules"][rule]["verbs"].remove(verb)
                less["metadata"].pop("resourceVersion")
                await here.cluster.must("PUT", role, less)
                said = ""
                end = time.monotonic() + 30
                while "rbac.yaml" not in said:  # the authoriser learns of it a moment later
                    assert time.monotonic() < end, f"{verb} of rule {rule} was never missed"
                    try:
                        await here.actuator.refresh()
                        said = " ".join((await here.actuator.apply(1, 2, False)).actions)
                        await here.cluster.must(
                            "PATCH", here.path + "/scale", {"spec": {"replicas": 1}}, "application/merge-patch+json"
                        )
                    except Exception as error:  # noqa: BLE001 - the text is what is judged
                        said = str(error)
                    await asyncio.sleep(0.1)
            whole["metadata"].pop("resourceVersion")
            await here.cluster.must("PUT", role, whole)
            status, _ = await _as_planner(here, "DELETE", here.path)
            assert status == 403, "the planner may not touch the Deployment itself"

    asyncio.run(story())


async def _as_planner(here: Stand, method: str, path: str) -> tuple[int, str]:
    headers = {"Authorization": "Bearer planner-token"}
    async with here.cluster.session.request(
        method, here.cluster.url + path, headers=headers, ssl=here.cluster.tls
    ) as it:
        return it.status, await it.text()


def test_one_lease_one_writer() -> None:
    async def story() -> None:
        async with stand("Deployment", 1, "lease") as here:
            await here.ready(1)
            ahead = [0.0]
            what = ("Deployment", "lease")
            async with served(here.proxy.app()) as admin:
                other = hands(here.client, here.cluster.session, admin, what, ahead)
                await other.refresh()
                assert (await other.apply(1, 2, False)).reason == "not_the_writer"
                ahead[0] = 31.0
                await other.refresh()
                assert (await other.apply(1, 2, False)).accepted
                await here.actuator.refresh()
                assert (await here.actuator.apply(2, 3, False)).reason == "not_the_writer"
                await other.close()
            await here.actuator.refresh()
            assert (await here.actuator.apply(2, 3, False)).accepted

    asyncio.run(story())


def test_a_minute_without_the_api_server_changes_nothing() -> None:
    """SIGSTOP: connections are taken and never answered, as by an overloaded server."""

    async def story() -> None:
        async with stand("Deployment", 2, "silence") as here:
            await here.ready(2)
            server = int((RUN / "apiserver.pid").read_text())
            os.kill(server, signal.SIGSTOP)
            try:
                began, failures = time.monotonic(), 0
                while time.monotonic() - began < 60:
                    with pytest.raises(Exception, match="no answer"):
                        await here.actuator.refresh()
                    assert not (await here.actuator.apply(2, 1, False)).accepted
                    assert not (await here.actuator.apply(2, 5, False)).accepted
                    failures += 1
            finally:
                os.kill(server, signal.SIGCONT)
            assert failures
            await here.answers()
            await here.ready(2)
            assert (await here.actuator.apply(2, 3, False)).accepted
            await here.ready(3)

    asyncio.run(story())


def test_fifty_scale_downs_never_end_a_pod_with_a_request_in_flight() -> None:
    """A StatefulSet goes up and down; what is in flight is the fake proxy's word, no engine answers here."""

    async def story() -> None:
        async with stand("StatefulSet", 2, "fifty") as here:
            await here.ready(2)
            cut, done = [], 0
            for _ in range(50):
                assert (await here.actuator.apply(2, 3, False)).accepted
                await here.ready(3)
                victim = max(here.proxy.states, key=lambda url: int(url.rpartition(".")[2].partition(":")[0]))
                here.proxy.in_flight = {victim: 1}
                assert (await here.actuator.apply(3, 2, False)).accepted
                await here.until(lambda: "draining" in here.proxy.states.values(), "a drain", looks=False)
                if victim not in here.actuator.states() or await here.cluster.replicas(here.path) != 3:
                    cut.append(victim)
                here.proxy.in_flight = {}
                assert await here.told("stopped") == ""
                await here.ready(2)
                done += 1
            assert (done, cut) == (50, [])

    asyncio.run(story())


def test_a_rolling_restart_on_a_real_controller() -> None:
    async def story() -> None:
        async with stand("Deployment", 3, "rolling") as here:
            await here.ready(3)
            old = set(here.actuator.states())
            assert (await here.actuator.restart()).accepted
            await here.told("restarted")
            await here.ready(3)
            assert not old & set(here.actuator.states())

    asyncio.run(story())
