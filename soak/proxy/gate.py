"""A relay before one engine that hangs, stutters, refuses or cuts on command, as networks and sick engines do."""

from __future__ import annotations

import asyncio
import contextlib

from tests.proxy.proxy_fakes import RawServer

_REFUSAL = b'{"error": {"message": "busy", "type": "chaos"}}'
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n" % len(_REFUSAL)
)


class Gate(RawServer):
    """Passes bytes both ways until `mode` says otherwise: pass, hang, slow or refuse (health stays well)."""

    def __init__(self, engine_port: int) -> None:
        super().__init__()
        self._engine_port = engine_port
        self._links: set[asyncio.StreamWriter] = set()
        self._passing = asyncio.Event()
        self.set("pass")

    def set(self, mode: str) -> None:
        self.mode = mode
        self._passing.clear() if mode == "hang" else self._passing.set()

    @property
    def open_links(self) -> int:
        return len(self._links)

    def cut(self) -> None:
        """Every connection ends now, in the middle of whatever it carries."""
        for link in list(self._links):
            link.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._links.add(writer)
        try:
            await self._serve(reader, writer)
        finally:
            self._links.discard(writer)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        engine: asyncio.StreamWriter | None = None
        down: asyncio.Task[None] | None = None
        try:
            while data := await reader.read(65536):
                await self._passing.wait()
                if self.mode == "refuse" and data.startswith(b"POST"):
                    writer.write(_BUSY + _REFUSAL)
                    await writer.drain()
                    await asyncio.sleep(0.05)  # what is still on its way here would turn the close into a reset
                    return
                if engine is None:
                    answers, engine = await asyncio.open_connection("127.0.0.1", self._engine_port, limit=1 << 20)
                    down = asyncio.get_running_loop().create_task(self._down(answers, writer))
                engine.write(data)
        except (OSError, asyncio.CancelledError):
            return
        finally:
            if engine is not None:
                engine.transport.abort()
            if down is not None:
                down.cancel()
                await asyncio.gather(down, return_exceptions=True)

    async def _down(self, answers: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await answers.read(65536):
                await self._passing.wait()
                if self.mode == "slow":
                    await asyncio.sleep(0.2)
                client.write(data)
                await client.drain()
        client.close()
