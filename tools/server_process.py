"""Runs a server as a child that can never outlive its parent, and stops it without a trace.

Used by the demo and by the tests that drive real engines.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_SGLANG_GRPC_OFFSET = 10_000
SHARED_MEMORY = Path("/dev/shm")


class ServerError(RuntimeError):
    """A server did not come up, or died; the text holds the end of its log."""


def free_port(count: int = 1) -> int:
    """A port nobody listens on, below those that the system gives to outgoing connections: nobody takes it by chance.

    SGLang listens 10,000 above its port as well, which must be a port, too. Of `count` neighbours, the first.
    """
    chance = random.SystemRandom()
    while True:
        port = chance.randrange(10_000, 22_000)
        if all(_is_free(port + above + at) for at in range(count) for above in (0, _SGLANG_GRPC_OFFSET)):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass
class ServerProcess:
    """One server in a session of its own, so that everything it starts can be found and stopped."""

    name: str
    command: Sequence[str]
    url: str
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    health_path: str = "/health"

    def start(self) -> ServerProcess:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._asked = False
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                list(self.command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.env},
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        return self

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + self.health_path, timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait_ready(self, seconds: float = 240.0, tick: Callable[[float], None] | None = None) -> None:
        """Returns when the server answers. `tick` is called about once a second with the seconds waited so far."""
        started = time.monotonic()
        while not self.is_healthy():
            waited = time.monotonic() - started
            if self.process is None or self.process.poll() is not None:
                raise ServerError(f"{self.name} died while starting: {first_error(self.log)}")
            if waited > seconds:
                raise ServerError(f"{self.name} did not answer within {seconds:.0f} s: {first_error(self.log)}")
            if tick is not None:
                tick(waited)
            time.sleep(0.5)

    def ask_to_stop(self) -> None:
        """Lets several servers end at the same time; `stop` still has to follow."""
        if self.process is not None and self.process.poll() is None and not self._asked:
            # A second signal means "at once" to most servers.
            self._asked = True
            self.process.terminate()

    def stop(self, seconds: float = 30.0) -> None:
        """Asks the server to end, then makes it. Afterwards nothing of it is left. Idempotent."""
        if self.process is None:
            return
        session = self.process.pid
        segments = segments_of(members_of(session))
        if self.process.poll() is None:
            self.ask_to_stop()
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        _end_session(session, seconds=10.0)
        self.process = None
        remove_orphans(segments)

    def kill(self) -> None:
        """Ends everything of the server at once, as a crash would, and removes the shared memory that is left."""
        if self.process is None:
            return
        session = self.process.pid
        segments = segments_of(members_of(session))
        _kill_session(session)
        self.process.wait()
        self.process = None
        remove_orphans(segments)

    def stand_still(self, seconds: float = 60.0) -> None:
        """SIGSTOP to everything of the server; returns when all of it stands.

        Until then, on a busy machine, it may answer what comes after the signal.
        """
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while running := [each for each in members_of(self.process.pid) if not _stands_still(each)]:
            if time.monotonic() > deadline:
                raise ServerError(f"processes {running} of {self.name} do not stop")
            for each in running:
                _signal(each, signal.SIGSTOP)
            time.sleep(0.01)

    def go_on(self) -> None:
        """After `stand_still`."""
        assert self.process is not None
        for each in members_of(self.process.pid):
            _signal(each, signal.SIGCONT)


def first_error(log: Path) -> str:
    """The first line of a log that names an exception (later ones only repeat it), and where the rest is."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    named = (line for line in lines if re.search(r"\b\w*(Error|Exception|error): ", line))
    return f"{next(named, lines[-1] if lines else 'it said nothing').strip()} (whole log: {log})"


def members_of(session: int) -> list[int]:
    """The processes of a session, found in /proc because orphans have other parents. Zombies do not count."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            after_name = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        if int(after_name[3]) == session and after_name[0] != "Z":
            members.append(int(entry.name))
    return members


def _stands_still(process: int) -> bool:
    try:
        threads = list(Path(f"/proc/{process}/task").iterdir())
        return all((thread / "stat").read_text().rsplit(")", 1)[1].split()[0] in "TtZX" for thread in threads)
    except OSError:
        return False  # it, or one of its threads, has just ended: looked at again


def _end_session(session: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in members_of(session):
        _signal(process, signal.SIGTERM)
    while members_of(session) and time.monotonic() < deadline:
        time.sleep(0.1)
    _kill_session(session)


def _kill_session(session: int) -> None:
    for process in members_of(session):
        _signal(process, signal.SIGKILL)
    while members_of(session):
        time.sleep(0.05)


def _signal(process: int, number: signal.Signals) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return


def segments_of(processes: list[int]) -> dict[Path, int]:
    """The shared-memory segments that these processes have mapped or opened, with their inodes.

    By inode, because glibc maps a named semaphore under a temporary name: by name, every live one would look unused.
    """
    device, inodes = SHARED_MEMORY.stat().st_dev, set()
    for process in processes:
        inodes |= _inodes_in_use(process, device)
    segments = {}
    for path in SHARED_MEMORY.iterdir():
        inode = _inode_of(path)
        if inode in inodes:
            segments[path] = inode
    return segments


def remove_orphans(segments: Mapping[Path, int]) -> None:
    """Removes those of `segments` that their processes left behind (a killed engine does) and that nobody uses."""
    left = {path: inode for path, inode in segments.items() if _inode_of(path) == inode}
    if left:
        in_use = segments_of([int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()])
        for path in left.keys() - in_use.keys():
            path.unlink(missing_ok=True)


def _inode_of(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def _inodes_in_use(process: int, device: int) -> set[int]:
    inodes = set()
    folder = Path("/proc") / str(process)
    try:
        for line in (folder / "maps").read_text().splitlines():
            major, minor, inode = re.split("[: ]", " ".join(line.split()[3:5]))
            if os.makedev(int(major, 16), int(minor, 16)) == device:
                inodes.add(int(inode))
        for descriptor in (folder / "fd").iterdir():
            status = descriptor.stat()
            if status.st_dev == device:
                inodes.add(status.st_ino)
    except OSError:
        # It ended meanwhile, or belongs to somebody else: then its segments are not ours to remove either.
        return inodes
    return inodes
