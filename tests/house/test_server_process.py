"""Stopping a server leaves nothing of it, and nothing of anybody else is touched."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import uuid
from pathlib import Path

import pytest

from tools.server_process import SHARED_MEMORY, ServerError, ServerProcess, first_error, free_port, members_of

SERVER = """
import http.server, multiprocessing.shared_memory as shm, subprocess, sys
segment = shm.SharedMemory(name=sys.argv[2], create=True, size=4096)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def server(tmp_path: Path, code: str = SERVER) -> tuple[ServerProcess, Path]:
    port, name = free_port(), f"dynamo-test-{uuid.uuid4().hex}"
    command = [sys.executable, "-c", code, str(port), name]
    return ServerProcess("test", command, f"http://127.0.0.1:{port}", tmp_path / "log"), SHARED_MEMORY / name


@pytest.mark.parametrize("how", ["stopped", "killed", "stopped after its first process was killed"])
def test_nothing_of_a_stopped_server_is_left(tmp_path: Path, how: str) -> None:
    running, segment = server(tmp_path)
    running.start().wait_ready(20)
    assert running.process is not None
    session = running.process.pid
    assert len(members_of(session)) >= 2
    assert segment.exists()
    if how == "killed":
        running.kill()
    elif how != "stopped":
        # Its child and its resource tracker live on, and still tell which segments are theirs.
        os.kill(session, signal.SIGKILL)
    running.stop()
    assert not members_of(session)
    assert not segment.exists()


def test_a_living_semaphore_of_somebody_else_stays(tmp_path: Path) -> None:
    """glibc maps a named semaphore under another name than it has: by name it looks unused."""
    running, _ = server(tmp_path)
    running.start().wait_ready(20)
    before = set(SHARED_MEMORY.iterdir())
    lock = multiprocessing.get_context("spawn").Lock()
    (name,) = set(SHARED_MEMORY.iterdir()) - before
    running.stop()
    assert name.exists()
    del lock


def test_a_server_that_dies_says_why_in_one_line(tmp_path: Path) -> None:
    running, _ = server(tmp_path, "import sys\nprint('loading')\nraise ValueError('the model is too large')")
    running.start()
    with pytest.raises(ServerError, match="ValueError: the model is too large"):
        running.wait_ready(20)
    running.stop()


def test_the_first_error_of_a_log_is_the_one_that_matters(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("INFO: up\nOSError: no space left\nRuntimeError: engine failed, see above\n")
    assert first_error(log).startswith("OSError: no space left")
    assert first_error(tmp_path / "absent").startswith("it said nothing")


def test_a_server_that_stands_still_answers_nobody_until_it_goes_on(tmp_path: Path) -> None:
    running, _ = server(tmp_path)
    running.start().wait_ready(20)
    try:
        assert running.process is not None
        running.stand_still()
        states = [Path(f"/proc/{each}/stat").read_text().rsplit(")", 1)[1] for each in members_of(running.process.pid)]
        assert len(states) >= 2
        assert all(state.split()[0] == "T" for state in states)
        running.go_on()
        running.wait_ready(20)
    finally:
        running.stop()


def test_stopping_is_idempotent(tmp_path: Path) -> None:
    running, _ = server(tmp_path)
    running.start().wait_ready(20)
    running.stop()
    running.stop()
    assert running.process is None


def test_a_free_port_leaves_room_for_what_an_engine_derives_from_it() -> None:
    """SGLang adds 10,000 to its port; what the system gives to outgoing connections begins at 32,768."""
    assert all(10_000 <= free_port() < 22_000 for _ in range(200))
