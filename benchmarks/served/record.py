"""The raw figures: one JSON line each, written and flushed as they come, so that a run cut short keeps what it has."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Fact = dict[str, Any]


class Record:
    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._started

    def note(self, part: str, **facts: Any) -> None:
        self._file.write(json.dumps({"part": part, "at_seconds": round(self.seconds, 3), **_short(facts)}) + "\n")
        self._file.flush()

    def say(self, text: str) -> None:
        print(f"[{self.seconds:6.1f} s] {text}", flush=True)

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[Fact]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _short(facts: Mapping[str, Any]) -> Fact:
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in facts.items()}
