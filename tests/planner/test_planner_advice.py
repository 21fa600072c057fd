"""What the demo tells of an advisory planner's log: each advice once, however often it was given."""

from __future__ import annotations

import json
from pathlib import Path

from demo.planning import Advice, advice


def test_advice_that_nobody_follows_is_told_once(tmp_path: Path) -> None:
    said = [(2, 2, "stabilising"), (2, 1, "idle_window"), (2, 2, "rate_limited"), (2, 1, "idle_window")]
    said += [(3, 3, "steady"), (3, 3, "rate_limited"), (3, 2, "idle_window")]
    lines = [{"kind": "actuation", "at": "2026-01-01T00:00:00+00:00", "what": "ready"}]
    for second, (current, desired, reason) in enumerate(said):
        told = {"current": current, "desired": desired, "reason": reason, "explanation": f"{reason} {second}"}
        lines.append({"kind": "decision", "at": f"2026-01-01T00:00:{second:02}+00:00", "decision": told})
    log = tmp_path / "decisions.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert advice(log) == [
        Advice(0, 2, 2, "stabilising 0", 1),
        Advice(1, 2, 1, "idle_window 3", 3),
        Advice(4, 3, 3, "steady 4", 2),
        Advice(6, 3, 2, "idle_window 6", 1),
    ]
