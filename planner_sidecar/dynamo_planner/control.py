"""The planner's own port: /metrics, /health, /decisions and manual orders through /scale."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import ActuationError, ConfigError
from .planner import Planner

if TYPE_CHECKING:
    from aiohttp import web

_STATUS = {"advisory": 409, "out_of_bounds": 400}


class ControlPort:
    """A small aiohttp server around one planner."""

    def __init__(self, planner: Planner, stalled_seconds: float, clock: Callable[[], float]) -> None:
        self._planner = planner
        self._stalled_seconds = stalled_seconds
        self._clock = clock
        self._born = clock()
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen and return the port. Raises ConfigError when it cannot be had."""
        from aiohttp import web

        app = web.Application(client_max_size=65_536)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/health", self._health)
        app.router.add_get("/decisions", self._decisions)
        app.router.add_post("/scale", self._scale)
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

        body = self._planner.parts.metrics.render()
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _health(self, request: web.Request) -> web.Response:
        from aiohttp import web

        last = self._planner.last_tick_seconds
        age = self._clock() - (self._born if last is None else last)
        stalled = age > self._stalled_seconds
        said = {
            "status": "stalled" if stalled else "ok",
            "mode": self._planner.parts.actuator.mode,
            "last_tick_age_seconds": round(age, 3),
            "replicas": dict(self._planner.parts.actuator.states()),
        }
        return web.json_response(said, status=503 if stalled else 200)

    async def _decisions(self, request: web.Request) -> web.Response:
        from aiohttp import web

        kept = list(self._planner.parts.log.last)
        try:
            count = int(request.query.get("n", len(kept)))
        except ValueError:
            return _refuse(400, "n must be a whole number, as in /decisions?n=10")
        return web.json_response({"decisions": kept[-count:] if count > 0 else []})

    async def _scale(self, request: web.Request) -> web.Response:
        from aiohttp import web

        try:
            replicas = json.loads(await request.text())["replicas"]
        except (ValueError, KeyError, TypeError):
            replicas = None
        if not isinstance(replicas, int) or isinstance(replicas, bool):
            return _refuse(400, 'send JSON with a whole number of replicas, as in {"replicas": 2}')
        try:
            decision, outcome = await self._planner.order(replicas)
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


def _refuse(status: int, text: str) -> web.Response:
    from aiohttp import web

    return web.json_response({"error": text}, status=status)
