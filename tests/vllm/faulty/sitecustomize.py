"""Read by every Python that has this folder on its path: calls of the system fail as files in a folder say.

`pwritev` with "28 2" in it: every second call fails with ENOSPC. "exit 1": every call ends its thread. "hang 1": every
call stays until the file is gone, and says so in `pwritev.hung`. `clock` with "-86400": the wall clock is a day behind.
Without a file a call is what it always was.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Names the folder; `tests/vllm/conftest.py` sets it for the engine that all tests share.
VARIABLE = "DYNAMO_TEST_FAULTS"


def _order(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except FileNotFoundError:
        return []


def _may_fail(real: Callable[..., Any], path: Path) -> Callable[..., Any]:
    numbers = itertools.count()

    def call(*arguments: Any) -> Any:
        if (order := _order(path)) and next(numbers) % int(order[1]) == 0:
            if order[0] == "exit":
                raise SystemExit
            if order[0] == "hang":
                return _late(real, path, *arguments)
            raise OSError(int(order[0]), os.strerror(int(order[0])))
        return real(*arguments)

    return call


def _late(real: Callable[..., Any], path: Path, *arguments: Any) -> Any:
    path.with_suffix(".hung").touch()
    while _order(path):
        time.sleep(0.05)
    return real(*arguments)


def _may_jump(real: Callable[[], float], path: Path) -> Callable[[], float]:
    return lambda: real() + sum(map(float, _order(path)))


if VARIABLE in os.environ:
    _FOLDER = Path(os.environ[VARIABLE])
    for _name in ("preadv", "pwritev"):
        setattr(os, _name, _may_fail(getattr(os, _name), _FOLDER / _name))
    time.time = _may_jump(time.time, _FOLDER / "clock")
