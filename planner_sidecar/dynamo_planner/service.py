"""Puts the parts together for one configuration and runs them until a signal comes."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from datetime import datetime

import aiohttp

from .actuator import Actuator, AdvisoryActuator
from .config import PlannerConfig
from .control import ControlPort
from .decision_log import DecisionLog
from .local_actuator import LocalProcessActuator
from .metrics import PlannerMetrics
from .observer import Observer
from .peers import Peers, ProxyAdmin
from .planner import Parts, Planner
from .replica import Surroundings

_MAX_SCRAPE_SECONDS = 5.0


def stamp() -> str:
    """The wall time for logs; decisions use a monotonic clock."""
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


def build_planner(
    config: PlannerConfig, session: aiohttp.ClientSession, log: DecisionLog, say: Callable[[str], None]
) -> Planner:
    """Wire one planner. The session and the log are the caller's to open."""
    peers = Peers(session, min(_MAX_SCRAPE_SECONDS, max(0.5, config.interval_seconds)))
    proxy = None if config.proxy_admin is None else ProxyAdmin(peers, config.proxy_admin)
    plan = config.launch_plan()
    actuator: Actuator = AdvisoryActuator()
    if plan is not None:
        around = Surroundings(peers, proxy, config.limits(), time.monotonic, asyncio.sleep)
        actuator = LocalProcessActuator(plan, around)
    parts = Parts(
        observer=Observer(config.engine, peers, proxy),
        actuator=actuator,
        log=log,
        metrics=PlannerMetrics(actuator.mode),
        clock=time.monotonic,
        stamp=stamp,
        say=say,
    )
    return Planner(config.policy(), parts)


async def serve(config: PlannerConfig, say: Callable[[str], None]) -> None:
    """Run until SIGINT or SIGTERM; a second signal kills the replicas at once. Raises ConfigError at
    start-up.
    """
    log = DecisionLog(config.decision_log)
    stop = asyncio.Event()
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
            planner = build_planner(config, session, log, say)
            port = ControlPort(planner, 3 * config.interval_seconds + 15.0, time.monotonic)
            bound = await port.start(config.host, config.port)
            _on_signals(stop, planner, say)
            try:
                say(
                    f"{planner.parts.actuator.mode}: {config.optimization_target} rule every "
                    f"{config.interval_seconds:g} s, {config.min_replicas}..{config.max_replicas} replicas, "
                    f"control on http://{config.host}:{bound}"
                )
                await planner.run(config.interval_seconds, stop)
            finally:
                say("stopping")
                await planner.close()
                await port.close()
    finally:
        log.close()


def _on_signals(stop: asyncio.Event, planner: Planner, say: Callable[[str], None]) -> None:
    def stopped() -> None:
        if stop.is_set():
            say("second signal: killing the replicas")
            planner.parts.actuator.kill_now()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped)
