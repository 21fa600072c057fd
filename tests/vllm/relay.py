"""A relay before a real engine that cuts a stream after so many events, as a dying engine would."""

from __future__ import annotations

import asyncio
import contextlib
import re

from tests.proxy.proxy_fakes import RawServer

_EVENT = re.compile(rb"data: ")


class Relay(RawServer):
    """Passes bytes both ways. With `cut_after`, an answer is cut behind as many of its events, once."""

    def __init__(self, engine_port: int, cut_after: int = 0) -> None:
        super().__init__()
        self._engine_port = engine_port
        self.cut_after = cut_after
        self.cuts = 0
        self.asked, self.told = bytearray(), bytearray()  # all that passed

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            engine_reader, engine_writer = await asyncio.open_connection("127.0.0.1", self._engine_port)
            down = asyncio.ensure_future(self._down(engine_reader, writer))
            try:
                while data := await reader.read(65536):
                    self.asked += data
                    engine_writer.write(data)
            finally:
                down.cancel()
                for side in (writer, engine_writer):
                    side.transport.abort()

    async def _down(self, engine: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        events = 0
        while data := await engine.read(65536):
            starts = [match.start() for match in _EVENT.finditer(data)]
            if self.cut_after and events + len(starts) > self.cut_after:
                data = data[: starts[self.cut_after - events]]
                self.cut_after, self.cuts = 0, self.cuts + 1
                self.told += data
                client.write(data)
                break
            events += len(starts)
            self.told += data
            client.write(data)
        client.close()
