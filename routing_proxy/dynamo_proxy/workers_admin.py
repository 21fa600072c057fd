"""One admin listener before the admin sockets of all workers: what changes goes to all, what is told is merged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from . import metrics
from .metric_merge import merge_pages

_TIMEOUT = aiohttp.ClientTimeout(total=10)
_MAX_BODY_BYTES = 64 * 1024
_SUMS = ("arrivals_total", "prompt_tokens_total", "matched_tokens_total")
Reply = tuple[int, bytes]


class WorkersAdmin:
    """Handlers that ask every worker. `sockets` names the admin sockets of those that live."""

    def __init__(self, sockets: Callable[[], Iterable[str]]) -> None:
        self._sockets = sockets

    def application(self) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_route("*", "/{path:.*}", self._all)
        return app

    async def engines(self) -> list[dict[str, Any]]:
        """The engines as the workers list them, merged."""
        replies = await self._ask("GET", "/engines", b"")
        rows: list[dict[str, Any]] = merged([reply for status, reply in replies if status == 200]).get("engines", [])
        return rows

    async def _all(self, request: web.Request) -> web.Response:
        body = await request.read()
        if request.method == "DELETE" and request.path == "/engines":
            url = request.query.get("url", "").rstrip("/")
            busy = sum(row["in_flight"] for row in await self.engines() if row["url"] == url)
            if busy:  # found out before one worker has let go and another has not
                message = f"{busy} requests are in flight on {url}; drain it and wait"
                return _json(409, orjson.dumps({"error": {"message": message, "code": "engine_busy"}}))
        replies = await self._ask(request.method, request.raw_path, body)
        if not replies:
            return _json(503, orjson.dumps({"error": {"message": "no worker is up; try again", "code": "no_worker"}}))
        status = max(status for status, _ in replies)
        if status != 200:
            return _json(status, next(reply for code, reply in replies if code == status))
        return _json(200, orjson.dumps(merged([reply for _, reply in replies])))

    async def _metrics(self, request: web.Request) -> web.Response:
        replies = await self._ask("GET", "/metrics", b"")
        page = merge_pages(reply.decode() for status, reply in replies if status == 200)
        return web.Response(body=page.encode(), headers={"content-type": metrics.CONTENT_TYPE})

    async def _ask(self, method: str, path: str, body: bytes) -> list[Reply]:
        """The answers of the workers that answer."""
        replies = await asyncio.gather(*(_call(socket, method, path, body) for socket in self._sockets()))
        return [reply for reply in replies if reply is not None]


async def _call(socket: str, method: str, path: str, body: bytes) -> Reply | None:
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket), timeout=_TIMEOUT) as session,
            session.request(method, f"http://worker{path}", data=body or None) as answer,
        ):
            return answer.status, await answer.read()
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
        return None


def merged(replies: list[bytes]) -> dict[str, Any]:
    """One answer out of the workers' answers: loads and totals summed, the rest as the first says it; a state that
    is not "ready" anywhere is told.
    """
    answers = [orjson.loads(reply) for reply in replies]
    if not answers:
        return {}
    first: dict[str, Any] = answers[0]
    if "engines" not in first:
        return _row(answers) if "in_flight" in first else first
    rows: dict[str, list[dict[str, Any]]] = {}
    for answer in answers:
        for row in answer["engines"]:
            rows.setdefault(row["url"], []).append(row)
    totals = {name: sum(answer[name] for answer in answers) for name in _SUMS}
    return {**first, **totals, "engines": [_row(same) for same in rows.values()]}


def _row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    states = [row["state"] for row in rows if row["state"] != "ready"]
    return {
        **rows[0],
        "in_flight": sum(row["in_flight"] for row in rows),
        "state": states[0] if states else "ready",
        "was_ready": any(row["was_ready"] for row in rows),
    }


def _json(status: int, body: bytes) -> web.Response:
    return web.Response(status=status, body=body, content_type="application/json")
