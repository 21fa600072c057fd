"""What a probe reports: plain records, no printing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Level(str, Enum):
    """How bad it is: only `fail` makes the doctor's exit code 1; `absent` is an optional part not installed."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    ABSENT = "absent"


@dataclass(frozen=True)
class Finding:
    """One line of the report. A failure always says what to do."""

    level: Level
    name: str
    detail: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.level is Level.FAIL and not self.remedy:
            raise ValueError(f"finding {self.name!r} fails without a remedy")


def is_healthy(findings: Sequence[Finding]) -> bool:
    """Whether nothing failed."""
    return all(finding.level is not Level.FAIL for finding in findings)


def in_gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
