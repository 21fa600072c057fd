"""What a planner leaves on disk about each local replica, so that the next planner can go on with it.

A record is locked while its planner lives: the kernel lets go when that planner dies, however it dies.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Life:
    """A started replica. `birth` tells its process from a later one with the same number, `fleet` is whose it is."""

    port: int
    pid: int
    birth: str
    command: str
    fleet: str
    gpus: tuple[str, ...] = ()
    is_terminated: bool = False


class ReplicaRecord:
    """One locked file. Without it a replica runs as well: a disk that refuses only costs the adoption."""

    def __init__(self, path: Path, life: Life, descriptor: int) -> None:
        self._path = path
        self.life = life
        self._descriptor: int | None = descriptor

    @classmethod
    def write(cls, path: Path, life: Life) -> ReplicaRecord | None:
        descriptor = _locked(path)
        if descriptor is None:
            return None
        record = cls(path, life, descriptor)
        record._store()
        return record

    @classmethod
    def read(cls, path: Path) -> ReplicaRecord | None:
        """None if another planner lives with it, or nobody can read it."""
        descriptor = _locked(path)
        if descriptor is None:
            return None
        try:
            plain = json.loads(os.pread(descriptor, 1 << 16, 0))
            life = Life(**{**plain, "gpus": tuple(plain["gpus"])})
        except (OSError, ValueError, TypeError, KeyError):
            os.close(descriptor)
            return None
        return cls(path, life, descriptor)

    def terminated(self) -> None:
        """It was told to stop: whoever finds it next must neither serve from it nor tell it twice."""
        if self._descriptor is not None and not self.life.is_terminated:
            self.life = replace(self.life, is_terminated=True)
            self._store()

    def remove(self) -> None:
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Leave the file to the next planner."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _store(self) -> None:
        assert self._descriptor is not None, "the record was let go"
        text = json.dumps(asdict(self.life)).encode()
        with suppress(OSError):
            os.pwrite(self._descriptor, text, 0)
            os.ftruncate(self._descriptor, len(text))


def record_path(folder: Path, port: int) -> Path:
    return folder / f"engine-{port}.json"


def records(folder: Path, ports: tuple[int, int]) -> Iterator[ReplicaRecord]:
    """The records in a folder, of these ports, that no living planner holds."""
    for port in range(ports[0], ports[1] + 1):
        path = record_path(folder, port)
        found = ReplicaRecord.read(path) if path.exists() else None
        if found is not None:
            yield found


def birth_of(pid: int) -> str | None:
    """Boot and clock tick at which a running process began; None if none with that number runs."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else f"{boot}/{fields[18]}"


def _locked(path: Path) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
