"""A worker's answer to GET /metrics: the page of all workers, asked of the supervisor."""

from __future__ import annotations

import asyncio

import aiohttp

from .client_connection import ClientConnection
from .metrics import CONTENT_TYPE

_TIMEOUT = aiohttp.ClientTimeout(total=15)


class SupervisorPage:
    """Fetches the page for one client at a time each."""

    def __init__(self, socket: str) -> None:
        self._socket = socket

    def fetch(self, client: ClientConnection) -> PageFetch:
        return PageFetch(client, self._socket)


class PageFetch:
    """One fetch on its way."""

    def __init__(self, client: ClientConnection, socket: str) -> None:
        self._client = client
        self._socket = socket
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            async with (
                aiohttp.ClientSession(connector=aiohttp.UnixConnector(self._socket), timeout=_TIMEOUT) as session,
                session.get("http://supervisor/metrics") as answer,
            ):
                page = await answer.read()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            self._client.refuse(503, "no_metrics", "the other workers cannot be asked; try again")
        else:
            self._client.reply(200, page, CONTENT_TYPE.encode())

    def abort(self, status: int, reason: str) -> None:
        self._task.cancel()

    def check(self) -> None:
        assert self._task.cancelled() or not self._task.done(), "a finished fetch still holds its client"
