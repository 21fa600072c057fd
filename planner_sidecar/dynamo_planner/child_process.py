"""One engine in its own session, started or taken over: signal its whole process group, and know for certain that it
is gone.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

from .errors import ActuationError
from .replica_record import Life, ReplicaRecord, birth_of, record_path

_PORT = re.compile(r"\{port(?:\+(\d{1,5}))?\}")


class EngineProcess:
    """An engine's process group, which lives and dies as one. Its output goes to `log_path`."""

    def __init__(self, pid: int, log_path: Path, record: ReplicaRecord | None) -> None:
        self.pid = pid
        self.log_path = log_path
        self.record = record
        self.signalled: set[int] = set()
        self._gone = False

    def gone(self) -> bool:
        """True once the leader has ended and no process of its group runs. Orphans of a dead leader are
        killed. It stays gone: its number may by then belong to somebody else's group.
        """
        if self._gone or self._leader_runs():
            return self._gone
        if not self._is_ours() or not group_alive(self.pid):
            self._gone = True
            if self.record is not None:
                self.record.remove()
            return True
        self._signal(signal.SIGKILL, once=False)
        return False

    def release(self) -> None:
        """Let go of it without a word: whoever comes next may go on with it."""
        if self.record is not None:
            self.record.release()

    def terminate(self) -> None:
        """SIGTERM, once: engines take a second one as an order to abort."""
        self._signal(signal.SIGTERM, once=True)

    def kill(self) -> None:
        self._signal(signal.SIGKILL, once=False)

    @property
    def exit_text(self) -> str:
        """How it ended and the last line that it wrote, for one clear sentence."""
        last = last_line(self.log_path)
        return f"{self._how()}; last words: {last}" if last else self._how()

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        assert self.pid > 1, "a process group of 0 or 1 would be our own or everybody's"
        assert self.signalled <= {signal.SIGTERM, signal.SIGKILL}, "only SIGTERM and SIGKILL are ever sent"

    def _signal(self, number: int, once: bool) -> None:
        if self._gone or not self._is_ours() or (once and number in self.signalled):
            return
        self.signalled.add(number)
        if self.record is not None:
            self.record.terminated()
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass  # gone already, which is what the signal was for
        except PermissionError as error:
            raise ActuationError("not_permitted", f"may not signal process group {self.pid}: {error}") from error

    def _is_ours(self) -> bool:
        """False once the number belongs to somebody else."""
        return True

    def _leader_runs(self) -> bool:
        raise NotImplementedError

    def _how(self) -> str:
        raise NotImplementedError


class ChildProcess(EngineProcess):
    """An engine that this planner has started, in a session of its own."""

    def __init__(self, command: str, port: int, log_path: Path, gpus: tuple[str, ...] = (), fleet: str = "") -> None:
        """Start `command` with `{port}`, `{port+N}` and `{gpus}` filled in. Raises ActuationError if it cannot be
        started.
        """
        named = ",".join(gpus)
        arguments = [_filled(part, port, named) for part in shlex.split(command)]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": named} if gpus else None
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            with log_path.open("ab") as output:
                self._process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=env,
                    start_new_session=True,
                )
        except OSError as error:
            raise ActuationError("cannot_start", f"cannot start {arguments[0]!r}: {error.strerror or error}") from error
        pid = self._process.pid
        birth = birth_of(pid)
        life = None if birth is None else Life(port, pid, birth, command, fleet, gpus)
        record = None if life is None else ReplicaRecord.write(record_path(log_path.parent, port), life)
        super().__init__(pid, log_path, record)

    def _leader_runs(self) -> bool:
        return self._process.poll() is None

    def _how(self) -> str:
        code = self._process.returncode
        return "still runs" if code is None else f"died of signal {-code}" if code < 0 else f"exited with code {code}"


class AdoptedProcess(EngineProcess):
    """An engine that an earlier planner has started; its exit code goes to somebody else."""

    def __init__(self, record: ReplicaRecord, log_path: Path) -> None:
        super().__init__(record.life.pid, log_path, record)
        self._birth = record.life.birth
        if record.life.is_terminated:
            self.signalled.add(signal.SIGTERM)

    def _is_ours(self) -> bool:  # a number is not given anew while a group bears it
        return birth_of(self.pid) in (None, self._birth)

    def _leader_runs(self) -> bool:
        return birth_of(self.pid) == self._birth

    def _how(self) -> str:
        return "still runs" if self._leader_runs() else "has ended; an earlier planner had started it"


def _filled(text: str, port: int, gpus: str) -> str:
    return _PORT.sub(lambda found: str(port + int(found[1] or 0)), text).replace("{gpus}", gpus)


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
