"""A proxy before engines that are there already, on a machine that may be busy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from dynamo_proxy.config import parse_engine_url

from tests.proxy.proxy_fakes import QUICK

T = TypeVar("T")
# Two cores may have other work.
PATIENT = replace(
    QUICK, connect_seconds=60.0, first_byte_seconds=300.0, idle_seconds=300.0, probe_timeout_seconds=60.0,
    probe_interval_seconds=1.0,
)  # fmt: skip


class Standing:
    """An engine that somebody else starts and stops. `url` as for `--engine`: a role may follow."""

    def __init__(self, url: str) -> None:
        self.address = parse_engine_url(url)

    async def stop(self) -> None:
        """Its owner does that."""


async def aside(call: Callable[[], T]) -> T:
    """What blocks, while the proxy of this loop goes on."""
    return await asyncio.get_running_loop().run_in_executor(None, call)
