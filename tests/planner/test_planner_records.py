"""What a planner finds on disk of replicas that it did not start is not obeyed beyond what is certainly theirs."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from dynamo_planner.child_process import AdoptedProcess, ChildProcess, group_alive
from dynamo_planner.config import load_config
from dynamo_planner.replica_record import Life, ReplicaRecord, birth_of, record_path, records

from tests.planner.planner_fakes import bench, child_command
from tests.planner.test_planner_local import actuate


def left_behind(folder: Path, port: int, pid: int, birth: str, is_terminated: bool = False) -> Path:
    """A record that no planner holds."""
    (folder / "logs").mkdir(exist_ok=True)
    command, path = child_command(folder), record_path(folder / "logs", port)
    record = ReplicaRecord.write(path, Life(port, pid, birth, command, command, is_terminated=is_terminated))
    assert record is not None
    record.release()
    return path


FORKS_TWICE = "import os, time\nif not os.fork():\n    time.sleep(600)\nos._exit(0)"


def test_a_group_of_somebody_else_whose_leader_has_ended_is_never_signalled(tmp_path: Path) -> None:
    """Every daemon that forked twice is one; its number may be that of a replica of the last boot."""

    async def story() -> None:
        async with bench(tmp_path, **actuate(tmp_path)) as stand:
            await stand.planner.tick()
            await stand.until("failed http://127.0.0.1:18100 (crashed)")

    daemon = subprocess.Popen([sys.executable, "-c", FORKS_TWICE], start_new_session=True)
    daemon.wait()
    try:
        assert group_alive(daemon.pid)
        left_behind(tmp_path, 18100, daemon.pid, "another boot/1")
        asyncio.run(story())
        assert group_alive(daemon.pid)
    finally:
        os.killpg(daemon.pid, signal.SIGKILL)


def test_orphans_of_a_leader_that_was_seen_alive_are_killed(tmp_path: Path) -> None:
    program = "import os, time\nif os.fork():\n    input()\nelse:\n    time.sleep(600)"
    engine = subprocess.Popen([sys.executable, "-c", program], start_new_session=True, stdin=subprocess.PIPE)
    try:
        birth = birth_of(engine.pid)
        assert birth is not None
        left_behind(tmp_path, 18100, engine.pid, birth)
        (record,) = records(tmp_path / "logs", (18100, 18100))
        adopted = AdoptedProcess(record, tmp_path / "log")
        assert not adopted.gone()
        engine.communicate(b"\n")
        deadline = time.monotonic() + 60
        while not adopted.gone():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not group_alive(engine.pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(engine.pid, signal.SIGKILL)


def test_records_of_the_last_boot_are_no_failed_starts(tmp_path: Path) -> None:
    for port in (18100, 18101, 18102):
        left_behind(tmp_path, port, 2**22 + port, "another boot/1")  # above the largest number there is

    async def story() -> None:
        async with bench(tmp_path, **actuate(tmp_path, min_replicas=3)) as stand:
            await stand.planner.tick()
            await stand.eventually(lambda: sum("(crashed)" in line for line in stand.said) == 3)
            _, outcome = await stand.planner.tick()
            assert outcome.reason == "started", outcome

    asyncio.run(story())


def test_the_record_of_another_user_is_not_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder may be one that anybody can have made, and births can be read in /proc."""
    path = left_behind(tmp_path, 18100, 2**22 + 1, "another boot/1", is_terminated=True)
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    assert list(records(path.parent, (18100, 18100))) == []
    monkeypatch.undo()
    (record,) = records(path.parent, (18100, 18100))
    record.release()


def test_a_record_is_not_reached_through_a_link(tmp_path: Path) -> None:
    path = left_behind(tmp_path, 18100, 2**22 + 1, "another boot/1")
    record_path(path.parent, 18101).symlink_to(path)
    assert list(records(path.parent, (18101, 18101))) == []


def test_a_record_that_was_removed_while_it_was_opened_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever holds it would remove by its name what another has written there since."""
    path = left_behind(tmp_path, 18100, 2**22 + 1, "another boot/1")
    lock = fcntl.flock

    def removed_meanwhile(descriptor: int, how: int) -> None:
        path.unlink()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    assert ReplicaRecord.read(path) is None


def test_a_record_can_be_read_whenever_its_planner_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = left_behind(tmp_path, 18100, 2**22 + 1, "another boot/1")
    (record,) = records(path.parent, (18100, 18100))
    monkeypatch.setattr(os, "ftruncate", lambda descriptor, size: None)  # killed between both calls
    record.terminated()
    record.release()
    (found,) = records(path.parent, (18100, 18100))
    assert found.life.is_terminated
    found.release()


def test_the_folder_of_logs_and_records_is_its_users_alone(tmp_path: Path) -> None:
    child = ChildProcess(f"{sys.executable} -c pass", 18100, tmp_path / "logs" / "engine-18100.log")
    deadline = time.monotonic() + 60
    while not child.gone():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o700
    assert load_config(None, {"engine": "http://a:1"}).engine_log_dir.name == f"dynamo-planner-{os.getuid()}"
