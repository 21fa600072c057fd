"""The decision log: one JSON line per decision, failed observation and happening; decisions can be made
again from it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from .decision import decide
from .errors import ConfigError, LogError
from .records import Decision


class DecisionLog:
    """Appends lines and keeps the last `keep` decisions for /decisions. Without a path it only keeps."""

    def __init__(self, path: Path | None, keep: int = 100) -> None:
        """Open for appending. Raises ConfigError if the file cannot be written."""
        self.last: deque[dict[str, Any]] = deque(maxlen=keep)
        self.failed_writes = 0
        self._file: TextIO | None = None
        if path is not None:
            try:
                self._file = path.open("a", encoding="utf-8")
            except OSError as error:
                text = f"cannot write the decision log {path}: {error.strerror}; choose another --decision-log"
                raise ConfigError(text) from error

    def write(self, kind: str, at: str, **fields: Any) -> None:
        """One line. A disk that refuses is counted, never raised: planning goes on."""
        line = {"kind": kind, "at": at, **fields}
        if kind == "decision":
            self.last.append(
                {key: value for key, value in line.items() if key != "decision"} | _short(line["decision"])
            )
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError:
            self.failed_writes += 1

    def close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                self.failed_writes += 1
            self._file = None

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        assert self.failed_writes >= 0, "a negative number of failed writes"
        assert all(entry["kind"] == "decision" for entry in self.last), "only decisions are kept"


@dataclass(frozen=True)
class ReplayReport:
    """How many decisions were made again, and one sentence for each that came out differently."""

    decisions: int
    differences: tuple[str, ...]


def encode(decision: Decision) -> dict[str, Any]:
    """A decision with all its inputs as plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(decision), allow_nan=False))
    return plain


def decode(plain: Mapping[str, Any]) -> Decision:
    """The inverse of `encode`. Raises LogError for anything else."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Decision).validate_python(dict(plain))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise LogError(f"not a decision: {where}: {first['msg']}") from error


def replay(lines: Iterable[str]) -> ReplayReport:
    """Decide again from every logged input and compare. Raises LogError naming a line that cannot be read."""
    count, differences = 0, []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if entry["kind"] != "decision":
                continue
            logged = decode(entry["decision"])
        except (ValueError, KeyError, TypeError, LogError) as error:
            raise LogError(f"line {number} cannot be read back: {error}") from error
        count += 1
        again = decide(logged.inputs)
        if again != logged:
            then, now = f"{logged.desired} ({logged.reason})", f"{again.desired} ({again.reason})"
            differences.append(f"line {number}: was {then}, is now {now}")
    return ReplayReport(count, tuple(differences))


def _short(decision: Mapping[str, Any]) -> dict[str, Any]:
    return {key: decision[key] for key in ("current", "desired", "reason", "explanation", "need_up", "need_down")}
