"""Starts the arms of a comparison together and hands out a client for each. While one is measured the others idle."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from types import TracebackType

import aiohttp

from benchmarks.served.arms import Arm, Site, server
from benchmarks.served.client import EngineClient, session
from benchmarks.served.record import Record
from tools.server_process import ServerError, ServerProcess

#: Two cores need minutes for several engines at a time; on a lent GPU one that hangs must not cost the others' time.
_START_SECONDS = {"tiny": 400.0, "gpu": 150.0}


class Fleet:
    """An arm that does not start is recorded with the first error of its log, and is missing from `clients`."""

    def __init__(self, arms: Sequence[Arm], site: Site, record: Record, start_seconds: float | None = None) -> None:
        self._servers = {arm.name: server(arm, site) for arm in arms}
        self._start_seconds = start_seconds or _START_SECONDS["tiny" if site.tiny else "gpu"]
        self._record = record
        self._session: aiohttp.ClientSession | None = None
        self.clients: dict[str, EngineClient] = {}

    async def __aenter__(self) -> Fleet:
        self._session = session()
        for process in self._servers.values():
            process.start()
        try:
            await asyncio.gather(*(self._wait(process) for process in self._servers.values()))
        except BaseException:
            await self._close()
            raise
        self.clients = {name: self.clients[name] for name in self._servers if name in self.clients}
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    def has(self, *names: str) -> bool:
        return all(name in self.clients for name in names)

    async def _wait(self, process: ServerProcess) -> None:
        started = time.monotonic()
        try:
            await asyncio.to_thread(process.wait_ready, self._start_seconds)
        except ServerError as error:
            said = [line for line in process.log.read_text().splitlines() if re.search(r"\w+Error: ", line)]
            self._record.note("boot", arm=process.name, error=str(error), errors=said[-8:])
            self._record.say("\n".join([f"{process.name} did not start: {error}", *said[-4:]]))
            return
        seconds = time.monotonic() - started
        self._record.note("boot", arm=process.name, seconds=seconds, command=list(process.command))
        self._record.say(f"{process.name} ready after {seconds:.0f} s")
        assert self._session is not None
        self.clients[process.name] = EngineClient(process.name, process.url, self._session)

    async def _close(self) -> None:
        if self._session is not None:
            await self._session.close()
        for process in self._servers.values():
            process.ask_to_stop()
        for process in self._servers.values():
            await asyncio.to_thread(process.stop, 15.0)
