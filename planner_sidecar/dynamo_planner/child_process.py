"""One engine in its own session: start it, signal its whole process group, and know for certain that it is
gone.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path

from .errors import ActuationError


class ChildProcess:
    """A started command. Its output goes to `log_path`; its process group lives and dies as one."""

    def __init__(self, command: str, port: int, log_path: Path) -> None:
        """Start `command` with `{port}` filled in. Raises ActuationError if it cannot be started."""
        self.log_path = log_path
        self.signalled: set[int] = set()
        self._gone = False
        arguments = [part.replace("{port}", str(port)) for part in shlex.split(command)]
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            with log_path.open("ab") as output:
                self._process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise ActuationError("cannot_start", f"cannot start {arguments[0]!r}: {error.strerror or error}") from error
        self.pid = self._process.pid

    def gone(self) -> bool:
        """True once the leader is reaped and no process of its group runs. Orphans of a dead leader are
        killed. It stays gone: its number may by then belong to somebody else's group.
        """
        if self._gone or self._process.poll() is None:
            return self._gone
        if not group_alive(self.pid):
            self._gone = True
            return True
        self._signal(signal.SIGKILL, once=False)
        return False

    def terminate(self) -> None:
        """SIGTERM, once: engines take a second one as an order to abort."""
        self._signal(signal.SIGTERM, once=True)

    def kill(self) -> None:
        self._signal(signal.SIGKILL, once=False)

    @property
    def exit_text(self) -> str:
        """How it ended and the last line that it wrote, for one clear sentence."""
        code = self._process.returncode
        how = "still runs" if code is None else f"died of signal {-code}" if code < 0 else f"exited with code {code}"
        last = last_line(self.log_path)
        return f"{how}; last words: {last}" if last else how

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        assert self.pid > 1, "a process group of 0 or 1 would be our own or everybody's"
        assert self.signalled <= {signal.SIGTERM, signal.SIGKILL}, "only SIGTERM and SIGKILL are ever sent"

    def _signal(self, number: int, once: bool) -> None:
        if self._gone or (once and number in self.signalled):
            return
        self.signalled.add(number)
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass  # gone already, which is what the signal was for
        except PermissionError as error:
            raise ActuationError("not_permitted", f"may not signal process group {self.pid}: {error}") from error


def group_alive(group: int) -> bool:
    """Whether any process of the group runs; zombies that nobody reaps do not count."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        entries = [entry for entry in os.listdir("/proc") if entry.isdigit()]
    except OSError:
        return True  # not Linux: trust the signal
    return any(_runs_in(entry, group) for entry in entries)


def _runs_in(entry: str, group: int) -> bool:
    try:
        text = Path("/proc", entry, "stat").read_text()
    except OSError:
        return False
    state, _parent, its_group = text.rpartition(")")[2].split()[:3]
    return int(its_group) == group and state not in "ZX"


def last_line(path: Path, tail_bytes: int = 4096) -> str:
    """The last non-empty line of a file, cut to 200 characters; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - tail_bytes))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    return next((line[:200] for line in reversed(lines) if line), "")
