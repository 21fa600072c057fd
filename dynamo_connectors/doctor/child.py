"""Runs a probe in a child interpreter: what it imports may take seconds, abort, or hang."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """How a child ended. `complaint` is its last line of stderr, or how it died."""

    ok: bool
    stdout: str
    complaint: str
    timed_out: bool = False


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def run_python(code: str, *arguments: str, timeout_seconds: float) -> Outcome:
    """Runs `code` with `arguments` in sys.argv; kills it after the timeout. Ctrl-C reaches it: same process group."""
    command = [sys.executable, "-c", code, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as child:
        try:
            stdout, stderr = child.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            return Outcome(False, "", f"no answer after {timeout_seconds:g} s", timed_out=True)
    if child.returncode < 0:
        return Outcome(False, stdout, f"killed by {signal.Signals(-child.returncode).name}")
    return Outcome(child.returncode == 0, stdout, last_line(stderr) or f"exit {child.returncode}")
