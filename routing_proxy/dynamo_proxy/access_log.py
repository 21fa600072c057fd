"""What is written down of each request that is over, in batches: a request only leaves a record behind."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

import orjson

from .errors import ConfigError
from .receipts import Receipt

_FLUSH_SECONDS = 0.25
_MAX_WAITING = 20_000
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
log = logging.getLogger("dynamo_proxy")


class Ended(NamedTuple):
    """How a request ended: its status (499: its client left), why, and how long after it was complete."""

    status: int
    reason: str
    seconds: float


class Record(NamedTuple):
    """One request that is over, `at` seconds since the epoch. `headers` are the lines that passed to its engine."""

    at: float
    endpoint: str
    model: str
    ended: Ended
    receipt: Receipt | None
    headers: bytes


class Sink(Protocol):
    """Where records go."""

    def write(self, records: Sequence[Record], dropped: int) -> int:
        """Returns how many are lost, of these and of the `dropped` ones before that nobody was told of yet."""
        ...

    async def close(self) -> None: ...


class RequestLog:
    """Records wait in memory, at most so many, and go to their sinks four times a second."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks
        self._waiting: list[Record] = []
        self._dropped = [0] * len(sinks)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def add(self, endpoint: str, model: str, ended: Ended, receipt: Receipt | None, headers: bytes) -> None:
        """A request is over."""
        if len(self._waiting) >= _MAX_WAITING:
            self._dropped = [count + 1 for count in self._dropped]
        else:
            self._waiting.append(Record(time.time(), endpoint, model, ended, receipt, headers))

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self.flush()
        for sink in self._sinks:
            await sink.close()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        waiting, self._waiting = self._waiting, []
        written = zip(self._sinks, self._dropped, strict=True)
        self._dropped = [sink.write(waiting, dropped) for sink, dropped in written]

    def check(self) -> None:
        assert len(self._waiting) <= _MAX_WAITING, "too many records wait"
        assert self._task is None or not self._task.done(), "nobody writes the records"


class LogFile:
    """One line of JSON per request. `-` is standard output."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError."""
        try:
            self._file = os.dup(sys.stdout.fileno()) if path == "-" else os.open(path, _FLAGS, 0o640)
        except OSError as error:
            raise ConfigError(f"cannot write --access-log {path} ({error.strerror}); name a file or -") from None

    def write(self, records: Sequence[Record], dropped: int) -> int:
        """A disk that is full costs the lines, not the requests."""
        lines = b"".join([_line(record) for record in records])
        if dropped:
            lines += orjson.dumps({"dropped": dropped}) + b"\n"
        try:
            while lines:
                lines = lines[os.write(self._file, lines) :]
        except OSError as error:
            log.warning("the access log cannot be written (%s): %d lines are lost", error.strerror, len(records))
            return dropped + len(records)
        return 0

    async def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _line(record: Record) -> bytes:
    said: dict[str, Any] = {
        "time": round(record.at, 3),
        "endpoint": record.endpoint,
        "model": record.model,
        "status": record.ended.status,
        "end": record.ended.reason,
        "seconds": round(record.ended.seconds, 6),
    }
    if record.receipt is not None:
        said |= asdict(record.receipt)
    return orjson.dumps(said) + b"\n"
