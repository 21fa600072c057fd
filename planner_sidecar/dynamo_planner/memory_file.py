"""What the planner has learnt, kept in a file, so that one that was killed goes on with its models and its forecast.

The stabilisation window is not carried over: a planner that comes back gives nothing up before it has watched anew for
the whole window.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from .errors import ConfigError
from .records import Memory

_MAX_AGE_SECONDS = 7 * 86_400.0


class MemoryFile:
    """One JSON file for all pools, replaced as a whole. A disk that refuses is counted, never raised."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.failed_writes = 0

    def load(self, now: float, wall: float) -> tuple[dict[str, Memory], str]:
        """(memories by pool, a sentence for the console). A file that cannot be read is no memory, never an end.

        Raises ConfigError if the folder cannot be written.
        """
        if not os.access(self._path.parent, os.W_OK):
            raise ConfigError(f"cannot write into {self._path.parent}; choose another --memory-file")
        from pydantic import TypeAdapter, ValidationError

        try:
            plain = json.loads(self._path.read_text(encoding="utf-8"))
            age = wall - float(plain["wall_seconds"])
            pools = TypeAdapter(dict[str, Memory]).validate_python(plain["pools"])
        except FileNotFoundError:
            return {}, f"no memory in {self._path} yet"
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            return {}, f"the memory in {self._path} cannot be read ({type(error).__name__}); starting without"
        if not 0 <= age <= _MAX_AGE_SECONDS:
            return {}, f"the memory in {self._path} is {age:.0f} s old; starting without"
        return {
            name: resumed(memory, now) for name, memory in pools.items()
        }, f"goes on from {self._path}, {age:.0f} s old"

    def save(self, pools: Mapping[str, Memory], wall: float) -> None:
        text = json.dumps({"wall_seconds": wall, "pools": {name: asdict(memory) for name, memory in pools.items()}})
        beside = self._path.with_name(self._path.name + ".new")
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(self._path)
        except OSError:
            self.failed_writes += 1


def resumed(memory: Memory, now: float) -> Memory:
    """The same knowledge for a planner that starts now: no window, no start-ups under way, and a fresh pause."""
    return replace(
        memory,
        since_seconds=None,
        needs=(),
        starting=(),
        last_count=None,
        last_down_seconds=now,
        last_asked_seconds=now,
        arrival_rate=None,
    )
