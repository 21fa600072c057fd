"""Puts the parts together for one configuration and runs them until a signal comes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

import aiohttp

from .actuator import Actuator, AdvisoryActuator
from .config import PlannerConfig
from .control import ControlPort
from .decision_log import DecisionLog
from .errors import ConfigError
from .fleet import Fleet
from .hook_actuator import HookActuator
from .kube_access import KubeAccess, find_access
from .kube_actuator import KubernetesActuator
from .kube_client import KubeClient
from .kube_lease import WriterLease
from .local_actuator import LocalProcessActuator
from .memory_file import MemoryFile
from .metrics import PlannerMetrics
from .observer import ANY_ROLE, Observer
from .peers import Peers, ProxyAdmin
from .planner import DEFAULT_POOL, Parts, Planner
from .profile_file import with_profile
from .replica import Surroundings
from .wall_clock import WallClock

_MAX_SCRAPE_SECONDS = 5.0


@dataclass(frozen=True)
class Common:
    """What all pools share. `access` is None unless a pool scales in a cluster."""

    session: aiohttp.ClientSession
    log: DecisionLog
    metrics: PlannerMetrics
    say: Callable[[str], None]
    access: KubeAccess | None = None


def stamp() -> str:
    """The wall time for logs; decisions use a monotonic clock."""
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


def build_fleet(
    config: PlannerConfig, session: aiohttp.ClientSession, log: DecisionLog, say: Callable[[str], None]
) -> Fleet:
    """Wire all pools. The session and the log are the caller's to open. Raises ConfigError."""
    pools = config.by_pool()
    in_cluster = any(pool.kubernetes is not None and not pool.advisory for pool in pools.values())
    access = find_access(config.kubeconfig) if in_cluster else None
    metrics = PlannerMetrics("advisory" if config.advisory else "actuate")
    common = Common(session, log, metrics, say, access)
    roles = [pool.role for pool in pools.values()]
    planners = {name: build_planner(name, pool, common, _owned_role(pool.role, roles)) for name, pool in pools.items()}
    memory_file = None if config.memory_file is None else MemoryFile(config.memory_file)
    return Fleet(planners, config.max_gpus, memory_file)


def _owned_role(role: str, roles: Sequence[str]) -> str | None:
    """Which of the engines that the proxy lists are a pool's: all of them, or those with a role that no other has."""
    if len(roles) == 1:
        return ANY_ROLE
    return role if role != "aggregated" and roles.count(role) == 1 else None


def build_planner(name: str, config: PlannerConfig, common: Common, owned_role: str | None) -> Planner:
    """Wire one pool."""
    peers = Peers(common.session, min(_MAX_SCRAPE_SECONDS, max(0.5, config.interval_seconds)))
    proxy = None if config.proxy_admin is None else ProxyAdmin(peers, config.proxy_admin, config.role)
    around = Surroundings(peers, proxy, config.limits(), time.monotonic, asyncio.sleep)
    parts = Parts(
        observer=Observer(config.engine, peers, proxy, config.targets(), owned_role),
        actuator=_actuator(name, config, common, around),
        log=common.log,
        metrics=common.metrics,
        clock=time.monotonic,
        wall=time.time,
        stamp=stamp,
        say=common.say,
    )
    planner = Planner(config.policy(), parts, name)
    if config.profile is not None:
        planner.memory = with_profile(planner.memory, config.profile)
    return planner


def _actuator(name: str, config: PlannerConfig, common: Common, around: Surroundings) -> Actuator:
    if config.advisory:
        return AdvisoryActuator()
    plan = config.launch_plan()
    if plan is not None:
        return LocalProcessActuator(plan, around)
    if config.scale_command is not None:
        return HookActuator(config.scale_command, config.command_seconds, around)
    if common.access is None:
        raise ConfigError(f"pool {name} has no way to scale; give engine_command, kubernetes or scale_command")
    settings = config.kube_settings(common.access.namespace)
    assert settings is not None, "a pool that acts has a command or a cluster"
    client = KubeClient(common.session, common.access, min(_MAX_SCRAPE_SECONDS, max(1.0, config.interval_seconds)))
    lease_name = config.lease_name if name == DEFAULT_POOL else f"{config.lease_name}-{name}"
    identity = f"{socket.gethostname()}-{os.getpid()}"
    duration = max(15.0, 3 * config.interval_seconds)
    lease = WriterLease(client, settings.target.namespace, lease_name, identity, duration)
    return KubernetesActuator(settings, client, lease, around, WallClock())


async def serve(config: PlannerConfig, say: Callable[[str], None]) -> None:
    """Run until SIGINT or SIGTERM; a second signal kills the replicas at once. Raises ConfigError at
    start-up.
    """
    log = DecisionLog(config.decision_log)
    stop = asyncio.Event()
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
            fleet = build_fleet(config, session, log, say)
            fleet.resume()
            port = ControlPort(fleet, 3 * config.interval_seconds + 15.0, time.monotonic)
            bound = await port.start(config.host, config.port)
            _on_signals(stop, fleet, say)
            try:
                say(
                    f"{fleet.first.parts.actuator.mode}: {config.optimization_target} rule every "
                    f"{config.interval_seconds:g} s, {config.min_replicas}..{config.max_replicas} replicas, "
                    f"control on http://{config.host}:{bound}"
                )
                await fleet.run(config.interval_seconds, stop)
            finally:
                say("stopping")
                await fleet.close()
                await port.close()
    finally:
        log.close()


def _on_signals(stop: asyncio.Event, fleet: Fleet, say: Callable[[str], None]) -> None:
    def stopped() -> None:
        if stop.is_set():
            say("second signal: killing the replicas")
            fleet.kill_now()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped)
