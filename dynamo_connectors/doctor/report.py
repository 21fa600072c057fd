"""Findings as one screen of text, or as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dynamo_connectors.doctor.finding import Finding, Level, is_healthy

STYLE = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red", Level.ABSENT: "dim"}

#: Rows come one by one, so the widest of each column is known beforehand: absent, dynamo-connectors.
LEVEL_WIDTH, NAME_WIDTH = 6, 17


def as_json(findings: Sequence[Finding]) -> str:
    rows = [
        {"level": finding.level.value, "name": finding.name, "detail": finding.detail, "remedy": finding.remedy}
        for finding in findings
    ]
    return json.dumps({"healthy": is_healthy(findings), "findings": rows}, indent=2)


def summary(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.level for finding in findings)
    return ", ".join(f"{counts[level]} {level.value}" for level in Level if counts[level])


def render_one(finding: Finding, console: Console) -> None:
    """Prints and flushes one row, the remedy below its detail; nothing is cut, lines wrap."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, min_width=LEVEL_WIDTH)
    table.add_column(no_wrap=True, min_width=NAME_WIDTH)
    table.add_column(overflow="fold")
    text = Text(finding.detail)
    if finding.remedy:
        text.append(f"\n-> {finding.remedy}", style="cyan" if finding.level is Level.FAIL else "dim")
    table.add_row(Text(finding.level.value, style=STYLE[finding.level]), finding.name, text)
    console.print(table)


def render_summary(findings: Sequence[Finding], console: Console) -> None:
    console.print(Text(summary(findings), style="green" if is_healthy(findings) else "bold red"))
