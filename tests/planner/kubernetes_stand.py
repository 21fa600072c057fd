"""A Kubernetes actuator, or a whole planner, on the fake API, for the tests that use it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from aiohttp import web
from dynamo_planner.actuator import Outcome
from dynamo_planner.config import PlannerConfig
from dynamo_planner.decision_log import DecisionLog
from dynamo_planner.fleet import Fleet
from dynamo_planner.kube_access import KubeAccess
from dynamo_planner.kube_actuator import KubernetesActuator
from dynamo_planner.kube_client import KubeClient
from dynamo_planner.kube_lease import WriterLease
from dynamo_planner.kube_target import KubeSettings, parse_target
from dynamo_planner.peers import Peers, ProxyAdmin
from dynamo_planner.replica import Limits, Surroundings
from dynamo_planner.service import build_fleet
from dynamo_planner.wall_clock import WallClock

from tests.planner.fake_kubernetes import FakeCluster
from tests.planner.planner_fakes import FakeEngine, FakeProxy, served

# No engine answers behind the stand's pods, so none can say that its leases are over.
QUICK = Limits(drain_seconds=20.0, terminate_seconds=20.0, resume_seconds=20.0, lease_seconds=0.0, poll_seconds=0.01)
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
