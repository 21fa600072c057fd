"""The decision log: one JSON line per decision, failed observation and happening; decisions can be made
again from it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .decision import decide
from .errors import ConfigError, LogError
from .records import Decision, DecisionInputs, Memory

if TYPE_CHECKING:
    from pydantic import TypeAdapter


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
            self._file.write(encode(line) + "\n")
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


def encode(line: Mapping[str, Any]) -> str:
    """One JSON line; frozen records stand as objects. Five times quicker than turning 500 engines into dicts first."""
    import orjson

    return orjson.dumps(line).decode()


class Chain:
    """Turns one pool's decisions into log entries. The memory between two decisions is the longer part of them, and
    follows from the one before: it is written whole at the start, after a gap and every `whole_every` entries.
    """

    def __init__(self, whole_every: int = 100) -> None:
        self._whole_every = whole_every
        self._last: Memory | None = None
        self._since_whole = 0

    def entry(self, decision: Decision) -> dict[str, Any]:
        """The decision with its inputs, fit for `encode`; `chain` says how its memory is to be had."""
        follows = self._last is decision.inputs.memory
        whole = not follows or self._since_whole + 1 >= self._whole_every
        self._last, self._since_whole = decision.memory, 0 if whole else self._since_whole + 1
        inputs = decision.inputs
        plain: dict[str, Any] = {
            "current": decision.current,
            "desired": decision.desired,
            "reason": decision.reason,
            "explanation": decision.explanation,
            "need_up": decision.need_up,
            "need_down": decision.need_down,
            "inputs": {
                "observation": inputs.observation,
                "policy": inputs.policy,
                "order": inputs.order,
                "ceiling": inputs.ceiling,
            },
            "chain": "next" if not whole else "check" if follows else "start",
        }
        if whole:
            plain["inputs"]["memory"] = inputs.memory
        return plain

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        assert 0 <= self._since_whole < self._whole_every, "the memory was not written when it was due"


def replay(lines: Iterable[str]) -> ReplayReport:
    """Decide again from every logged input and compare. Raises LogError naming a line that cannot be read."""
    count, differences = 0, []
    carried: dict[str, Memory] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if entry["kind"] != "decision":
                continue
            pool, logged = entry.get("pool", ""), entry["decision"]
            inputs = _inputs(logged, carried.get(pool))
        except (ValueError, KeyError, TypeError, LogError) as error:
            text = f"line {number} cannot be read back: {error}"
            raise LogError(f"{text}; delete it if a planner was killed while it wrote, and replay the rest") from error
        count += 1
        if logged["chain"] == "check" and pool in carried and carried[pool] != inputs.memory:
            differences.append(f"line {number}: the memory that led here came out differently")
        again = decide(inputs)
        carried[pool] = again.memory
        if _short(logged) != _short(_result(again)):
            then, now = f"{logged['desired']} ({logged['reason']})", f"{again.desired} ({again.reason})"
            differences.append(f"line {number}: was {then}, is now {now}")
    return ReplayReport(count, tuple(differences))


def _inputs(logged: Mapping[str, Any], carried: Memory | None) -> DecisionInputs:
    """What a logged decision depended on, as records. Raises LogError for anything else."""
    from pydantic import ValidationError

    plain = dict(logged["inputs"])
    if logged["chain"] == "next":
        if carried is None:
            raise LogError("its memory is told by an earlier line, which is not here; start at the head of the log")
        plain["memory"] = asdict(carried)
    try:
        return _reader().validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise LogError(f"not a decision: {where}: {first['msg']}") from error


@cache
def _reader() -> TypeAdapter[DecisionInputs]:
    from pydantic import TypeAdapter

    return TypeAdapter(DecisionInputs)


def _result(decision: Decision) -> dict[str, Any]:
    return {name: getattr(decision, name) for name in _RESULT}


_RESULT = ("current", "desired", "reason", "explanation", "need_up", "need_down")


def _short(decision: Mapping[str, Any]) -> dict[str, Any]:
    return {key: decision[key] for key in _RESULT}
