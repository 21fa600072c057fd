"""The planner's own port: the page, /metrics, /health, /desired, /decisions and manual orders through /scale."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from .errors import ActuationError, ConfigError
from .fleet import Fleet
from .page import render_page
from .planner import DEFAULT_POOL, Planner

if TYPE_CHECKING:
    from aiohttp import web

_STATUS = {"advisory": 409, "out_of_bounds": 400, "no_such_pool": 404}


class ControlPort:
    """A small aiohttp server around the pools."""

    def __init__(self, fleet: Fleet, stalled_seconds: float, clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._stalled_seconds = stalled_seconds
        self._clock = clock
        self._born = clock()
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen and return the port. Raises ConfigError when it cannot be had."""
        from aiohttp import web

        app = web.Application(client_max_size=65_536)
        app.router.add_get("/", self._page)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/health", self._health)
        app.router.add_get("/decisions", self._decisions)
        app.router.add_get("/desired", self._desired)
        app.router.add_post("/scale", self._scale)
        app.router.add_post("/restart", self._restart)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            await self.close()
            text = f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
            raise ConfigError(text) from error
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _metrics(self, request: web.Request) -> web.Response:
        from aiohttp import web
        from prometheus_client import CONTENT_TYPE_LATEST

        body = self._fleet.first.parts.metrics.render()
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _page(self, request: web.Request) -> web.Response:
        from aiohttp import web

        pools = {name: planner.history.sights for name, planner in self._fleet.planners.items()}
        text = render_page(pools, list(self._fleet.first.parts.log.last), self._fleet.first.parts.actuator.mode)
        return web.Response(text=text, content_type="text/html")

    def _age_seconds(self, planners: Iterable[Planner]) -> float:
        """Since the oldest of their last ticks, or since the start."""
        ticks = [planner.last_tick_seconds for planner in planners]
        return self._clock() - min((tick for tick in ticks if tick is not None), default=self._born)

    async def _health(self, request: web.Request) -> web.Response:
        from aiohttp import web

        planners = self._fleet.planners.values()
        age = self._age_seconds(planners)
        stalled = age > self._stalled_seconds
        said = {
            "status": "stalled" if stalled else "ok",
            "mode": self._fleet.first.parts.actuator.mode,
            "last_tick_age_seconds": round(age, 3),
            "replicas": {url: state for each in planners for url, state in each.parts.actuator.states().items()},
        }
        return web.json_response(said, status=503 if stalled else 200)

    async def _desired(self, request: web.Request) -> web.Response:
        """For KEDA's metrics-api scaler. What is too old to act on is no answer, and a guess is none."""
        from aiohttp import web

        pool = request.query.get("pool", DEFAULT_POOL)
        planner = self._fleet.planners.get(pool)
        if planner is None:
            return _refuse(404, f"no pool {pool!r}; there are: {', '.join(self._fleet.planners)}")
        if not planner.history.sights or self._age_seconds([planner]) > self._stalled_seconds:
            return _refuse(503, "no fresh decision; see /health")
        last = planner.history.sights[-1]
        if last.is_blind:
            return _refuse(503, "no engine or proxy of the pool can be read; keep what there is, and see /decisions")
        return web.json_response({"pool": pool, "desired_replicas": last.desired, "current_replicas": last.current})

    async def _decisions(self, request: web.Request) -> web.Response:
        from aiohttp import web

        kept = list(self._fleet.first.parts.log.last)
        try:
            count = int(request.query.get("n", len(kept)))
        except ValueError:
            return _refuse(400, "n must be a whole number, as in /decisions?n=10")
        return web.json_response({"decisions": kept[-count:] if count > 0 else []})

    async def _scale(self, request: web.Request) -> web.Response:
        from aiohttp import web

        try:
            body = json.loads(await request.text())
            replicas, pool = body["replicas"], body.get("pool", DEFAULT_POOL)
        except (ValueError, KeyError, TypeError, AttributeError):
            replicas, pool = None, ""
        if not isinstance(replicas, int) or isinstance(replicas, bool) or not isinstance(pool, str):
            return _refuse(400, 'send JSON with a whole number of replicas, as in {"replicas": 2}')
        try:
            decision, outcome = await self._fleet.order(pool, replicas)
        except ActuationError as error:
            return _refuse(_STATUS.get(error.reason, 409), str(error))
        if not outcome.accepted:
            return _refuse(409, "; ".join(outcome.actions) or outcome.reason)
        said = {
            "current": decision.current,
            "desired": decision.desired,
            "reason": decision.reason,
            "actions": list(outcome.actions),
        }
        return web.json_response(said, status=202 if decision.direction != "hold" else 200)

    async def _restart(self, request: web.Request) -> web.Response:
        from aiohttp import web

        try:
            pool = json.loads(await request.text() or "{}").get("pool", DEFAULT_POOL)
        except (ValueError, AttributeError):
            return _refuse(400, 'send nothing, or JSON with the name of a pool, as in {"pool": "decode"}')
        planner = self._fleet.planners.get(pool)
        if planner is None:
            return _refuse(404, f"no pool {pool!r}; there are: {', '.join(self._fleet.planners)}")
        async with planner.lock:
            outcome = await planner.parts.actuator.restart()
        said = {"reason": outcome.reason, "actions": list(outcome.actions)}
        return web.json_response(said, status=202 if outcome.accepted else 409)


def _refuse(status: int, text: str) -> web.Response:
    from aiohttp import web

    return web.json_response({"error": text}, status=status)
