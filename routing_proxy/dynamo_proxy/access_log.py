"""One line of JSON per request, written in batches: a request only leaves a record behind."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from dataclasses import asdict
from typing import Any

import orjson

from .errors import ConfigError
from .receipts import Receipt

_FLUSH_SECONDS = 0.25
_MAX_WAITING = 20_000
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
Record = tuple[float, str, str, int, str, float, "Receipt | None"]
log = logging.getLogger("dynamo_proxy")


class AccessLog:
    """Records wait in memory, at most so many, and go to a file four times a second. `-` is standard output."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError."""
        self._waiting: list[Record] = []
        self.dropped = 0
        try:
            self._file = os.dup(sys.stdout.fileno()) if path == "-" else os.open(path, _FLAGS, 0o640)
        except OSError as error:
            raise ConfigError(f"cannot write --access-log {path} ({error.strerror}); name a file or -") from None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def add(self, endpoint: str, model: str, status: int, reason: str, seconds: float, receipt: Receipt | None) -> None:
        """A request is over."""
        if len(self._waiting) >= _MAX_WAITING:
            self.dropped += 1
        else:
            self._waiting.append((time.time(), endpoint, model, status, reason, seconds, receipt))

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._file >= 0:
            self.flush()
            os.close(self._file)
            self._file = -1

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            self.flush()

    def flush(self) -> None:
        """Write what waits. A disk that is full costs the lines, not the requests."""
        waiting, self._waiting = self._waiting, []
        lines = b"".join([_line(record) for record in waiting])
        if self.dropped:
            lines += orjson.dumps({"dropped": self.dropped}) + b"\n"
        try:
            while lines:
                lines = lines[os.write(self._file, lines) :]
            self.dropped = 0
        except OSError as error:
            self.dropped += len(waiting)
            log.warning("the access log cannot be written (%s): %d lines are lost", error.strerror, len(waiting))

    def check(self) -> None:
        assert len(self._waiting) <= _MAX_WAITING, "too many lines wait"
        assert self._task is None or not self._task.done(), "nobody writes the access log"


def _line(record: Record) -> bytes:
    at, endpoint, model, status, reason, seconds, receipt = record
    said: dict[str, Any] = {
        "time": round(at, 3),
        "endpoint": endpoint,
        "model": model,
        "status": status,
        "end": reason,
        "seconds": round(seconds, 6),
    }
    if receipt is not None:
        said |= asdict(receipt)
    return orjson.dumps(said) + b"\n"
