"""The admin listener: engines and router mode, as JSON over HTTP, for the planner and for operators."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import orjson
from aiohttp import web

from .config import EngineAddress, parse_engine_url, parse_router_mode
from .engines import Engine, EngineRegistry
from .errors import ConfigError, EngineBusyError, EngineSettingsError, UnknownEngineError
from .ledger import Ledger
from .metrics import CONTENT_TYPE, Metrics
from .router import Router

_MAX_BODY_BYTES = 64 * 1024


class Fleet(Protocol):
    """What the admin calls may change."""

    registry: EngineRegistry
    ledger: Ledger
    metrics: Metrics
    router: Router

    def metrics_page(self) -> bytes: ...
    def add_engine(self, address: EngineAddress) -> Engine: ...
    async def remove_engine(self, engine: Engine) -> None: ...


class AdminRoutes:
    """Handlers of the admin listener."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def application(self) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[_errors_as_json])
        app.router.add_get("/engines", self._list)
        app.router.add_post("/engines", self._add)
        app.router.add_post("/engines/drain", self._drain)
        app.router.add_post("/engines/resume", self._resume)
        app.router.add_delete("/engines", self._remove)
        app.router.add_get("/router-mode", self._mode)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/router-mode", self._set_mode)
        return app

    def _row(self, engine: Engine) -> dict[str, object]:
        return {
            "url": engine.address.url,
            "name": engine.name,
            "state": engine.state,
            "was_ready": engine.was_ready,
            "role": engine.role,
            "deadlines": engine.address.options.deadlines,
            "discovered": engine.address.options.discovered,
            "in_flight": self._fleet.ledger.own(engine.slot).in_flight,
            "knowledge": engine.knowledge,
            "models": sorted(engine.models.ids) if engine.models is not None else [],
        }

    async def _list(self, request: web.Request) -> web.Response:
        tallies = self._fleet.metrics.tallies
        return _json(
            200,
            {
                "engines": [self._row(engine) for engine in self._fleet.registry],
                "arrivals_total": tallies.arrivals,
                "prompt_tokens_total": tallies.prompt_tokens,
                "matched_tokens_total": tallies.matched_tokens,
                "router_mode": self._fleet.router.state.mode,
            },
        )

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._fleet.metrics_page(), headers={"content-type": CONTENT_TYPE})

    async def _add(self, request: web.Request) -> web.Response:
        address = parse_engine_url(await _field(request, "url"))
        engine = self._fleet.add_engine(address)
        if not engine.address.options.holds(address.options):
            message = f"{address.url} is here with another role or other deadlines; drain and delete it, then add it"
            raise EngineSettingsError(message)
        return _json(200, self._row(engine))

    async def _drain(self, request: web.Request) -> web.Response:
        return await self._set_draining(request, True)

    async def _resume(self, request: web.Request) -> web.Response:
        return await self._set_draining(request, False)

    async def _set_draining(self, request: web.Request, draining: bool) -> web.Response:
        engine = self._fleet.registry.find(parse_engine_url(await _field(request, "url")))
        engine.draining = draining
        return _json(200, self._row(engine))

    async def _remove(self, request: web.Request) -> web.Response:
        engine = self._fleet.registry.find(parse_engine_url(request.query.get("url", "")))
        await self._fleet.remove_engine(engine)
        return _json(200, {"url": engine.address.url, "removed": True})

    async def _mode(self, request: web.Request) -> web.Response:
        return _json(200, {"mode": self._fleet.router.state.mode})

    async def _set_mode(self, request: web.Request) -> web.Response:
        self._fleet.router.state.mode = parse_router_mode(await _field(request, "mode"))
        return await self._mode(request)


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except ConfigError as error:
        return _json(400, {"error": {"message": str(error), "code": "bad_request"}})
    except UnknownEngineError as error:
        return _json(404, {"error": {"message": str(error), "code": "unknown_engine"}})
    except EngineSettingsError as error:
        return _json(409, {"error": {"message": str(error), "code": "other_settings"}})
    except EngineBusyError as error:
        return _json(409, {"error": {"message": str(error), "code": "engine_busy"}})
    except web.HTTPException as error:
        return _json(error.status, {"error": {"message": error.reason, "code": "http_error"}})


async def _field(request: web.Request, name: str) -> str:
    """One string field of a JSON body. Raises ConfigError with the shape wanted."""
    wanted = f'the body must be a JSON object with a string "{name}"'
    try:
        body = orjson.loads(await request.read())
    except orjson.JSONDecodeError:
        raise ConfigError(wanted) from None
    value = body.get(name) if isinstance(body, dict) else None
    if not isinstance(value, str):
        raise ConfigError(wanted)
    if len(body) > 1:
        raise ConfigError(f'{wanted} and nothing else; a role is part of a "url": "http://HOST:PORT,role=prefill"')
    return value


def _json(status: int, body: object) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(body), content_type="application/json")
