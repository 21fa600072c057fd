"""A worker process of `dynamo-proxy --workers N`: its configuration comes on standard input."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import sys
from typing import BinaryIO

import uvloop

from .config import ProxyConfig
from .errors import ProxyError
from .server import serve


def main() -> int:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="dynamo-proxy: %(message)s")
    config = _read(sys.stdin.buffer)
    if config is None:
        return 0  # the supervisor is gone
    try:
        uvloop.run(_serve(config))
    except ProxyError as error:
        sys.stderr.write(f"dynamo-proxy: {error}\n")
        return 2
    return 0


def _read(stream: BinaryIO) -> ProxyConfig | None:
    size = int.from_bytes(stream.read(8), "big")
    said = stream.read(size)
    if not size or len(said) < size:
        return None
    config = pickle.loads(said)  # from our own parent, over a pipe
    assert isinstance(config, ProxyConfig)
    return config


async def _serve(config: ProxyConfig) -> None:
    loop = asyncio.get_running_loop()
    descriptor = sys.stdin.fileno()

    def supervisor_ended() -> None:
        if not os.read(descriptor, 4096):
            loop.remove_reader(descriptor)
            os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(descriptor, supervisor_ended)
    try:
        await serve(config, _say_ready)
    finally:
        loop.remove_reader(descriptor)


def _say_ready() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
