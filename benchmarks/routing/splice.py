"""The floor of Python and uvloop: two protocols that hand bytes across, with no rule, no framing and no accounts.

    python -m benchmarks.routing.splice PORT ENGINE_PORT...

A client has an engine connection of its own, so nothing is ever parsed. Whatever a router in Python does, it reads and
writes as often as this.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import sys
from typing import cast

import uvloop


class Side(asyncio.Protocol):
    """One end; what comes in goes out of the other end."""

    __slots__ = ("other", "transport")

    def __init__(self, other: Side | None = None) -> None:
        self.other = other
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        other = self.other
        if other is not None and other.transport is not None:
            other.transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        other, self.other, self.transport = self.other, None, None
        if other is not None and other.transport is not None:
            other.transport.close()


class ClientSide(Side):
    """Dials an engine of its own; what comes meanwhile waits."""

    __slots__ = ("dial", "held", "port")

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port
        self.held = b""

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self.held += data
        else:
            super().data_received(data)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.dial = asyncio.ensure_future(self._dial())

    async def _dial(self) -> None:
        loop = asyncio.get_running_loop()
        _, self.other = await loop.create_connection(lambda: Side(self), "127.0.0.1", self.port)
        if self.held:
            self.data_received(self.held)


async def serve(port: int, engines: list[int]) -> None:
    gc.freeze()
    ports = itertools.cycle(engines)
    server = await asyncio.get_running_loop().create_server(
        lambda: ClientSide(next(ports)), "127.0.0.1", port, backlog=4096
    )
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), [int(text) for text in sys.argv[2:]]))
