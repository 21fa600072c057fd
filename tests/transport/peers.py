"""Real owners and readers in processes of their own, and somebody between them who can do anything to their talk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import Any

import zmq

from dynamo_connectors.transport import channel
from dynamo_connectors.transport.messages import Codec, Reply, Request
from tests.house.repository import ROOT, import_path
from tests.vllm.client import wait_until

#: Large enough that a READ over TCP does not fit into the buffers of the system.
ROWS, ROW_BYTES = 64, 1 << 20
KEYS = [f"key{number}" for number in range(16)]
DEADLINE_SECONDS = 5.0
#: What a loaded machine may cost.
SLOW = frozenset({"timeout", "unreachable", "unavailable"})


class PeerProcess:
    """Calls of any name go to the other process, see `peer_process`. `inside`: a command that runs it elsewhere."""

    def __init__(self, transports: str = "", inside: Sequence[str] = ()) -> None:
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{import_path()}", "UCX_LOG_LEVEL": "fatal"}
        env["NIXL_LOG_LEVEL"] = "FATAL"
        if transports:
            env["UCX_TLS"] = transports
        command = [*inside, sys.executable, "-m", "tests.transport.peer_process"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=ROOT, text=True
        )

    def call(self, what: str, **arguments: Any) -> Any:
        self.say(what, **arguments)
        return self.hear()

    def say(self, what: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the process died ({self.process.poll()})"
        return json.loads(line)

    def stop(self) -> None:
        """Returns when it stands still: before that, on a busy machine, it may answer what comes after the signal."""
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Reads:
    """A reader, and an address at which somebody may have the blocks of a lease."""

    reader: PeerProcess
    #: That of the first, where the owner has ranks.
    port: int
    lease = ""
    keys = KEYS

    def start_read(self, blocks: slice = slice(None)) -> int:
        rows = list(range(len(self.keys)))[blocks]
        number: int = self.reader.call("read", port=self.port, lease=self.lease, keys=self.keys[blocks], rows=rows)
        return number

    def end_read(self, number: int) -> set[str]:
        said = self.reader.call("wait", read=number)
        assert said is not None, "the read did not end"
        assert "WRONG" not in said
        return set(said)

    def read(self) -> set[str]:
        return self.end_read(self.start_read())

    def read_until(self, *said: str, may_say: Set[str] = SLOW, before: Callable[[], object] = lambda: None) -> None:
        """However slow the machine: the reader hears that in the end, and before that only what is allowed."""

        def is_told() -> bool:
            before()
            heard = self.read()
            assert heard <= {*said, *may_say}
            return heard == {*said}

        wait_until(is_told, f"the reader says {said}", 60.0)

    def read_until_right(self) -> None:
        """However slow the machine: a fleet that works gives right blocks in the end."""
        wait_until(lambda: self.read() == {"right"}, "the blocks arrive", 60.0)

    def leave(self) -> None:
        """The owner may have its blocks back."""
        for wanted in (True, False):
            self.reader.call("watch", port=self.port, lease=self.lease, wanted=wanted)


class Relay:
    """Between an owner and its readers: each has a connection of its own to it. With `secret`, as ours have."""

    def __init__(self, port: int, owner_port: int, secret: bytes = b"") -> None:
        self._owner, self._secret = f"tcp://127.0.0.1:{owner_port}", secret
        self._context: zmq.Context[Any] = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        if secret:
            self._monitor = channel.serve(self._front, secret)
        self._front.bind(f"tcp://127.0.0.1:{port}")
        self._backs: dict[bytes, zmq.Socket[Any]] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._stopping = True
        self._thread.join()
        self._context.destroy(linger=0)

    def _run(self) -> None:
        while not self._stopping:
            poller = zmq.Poller()
            for socket in (self._front, *self._backs.values()):
                poller.register(socket, zmq.POLLIN)
            ready = dict(poller.poll(20))
            if self._front in ready:
                client, *frames = self._front.recv_multipart()
                self._asked(client, frames)
            for client, back in list(self._backs.items()):
                if back in ready:
                    self._answered(client, back.recv_multipart())
            self._deliver()

    def _asked(self, client: bytes, frames: list[bytes]) -> None:
        self._back(client).send_multipart(frames)

    def _answered(self, client: bytes, frames: list[bytes]) -> None:
        self._front.send_multipart([client, *frames])

    def _deliver(self) -> None:
        """What is held up."""

    def _back(self, client: bytes) -> zmq.Socket[Any]:
        if client not in self._backs:
            back = self._backs[client] = self._context.socket(zmq.DEALER)
            if self._secret:
                channel.connect(back, self._secret)
            back.connect(self._owner)
        return self._backs[client]


Hook = Callable[[Request | Reply], int]


class Between(Relay):
    """`hook` sees each message before it is passed on and says how often that is done; it may do anything.

    `delay` says how many seconds later that is, to some 20 ms; `frame_of` gives what is delivered instead of its frame.
    """

    def __init__(self, port: int, owner_port: int, secret: bytes = b"s") -> None:
        self.hook: Hook = lambda message: 1
        self.delay: Callable[[Request | Reply], float] = lambda message: 0.0
        self.frame_of: Callable[[Request | Reply, bytes], bytes] = lambda message, frame: frame
        self.seen: list[str] = []
        self._codec = Codec(secret)
        #: What is to be delivered, and when.
        self._held: list[tuple[float, Callable[[], object]]] = []
        super().__init__(port, owner_port, secret)

    def at(self, kind: type, act: Callable[[], object], status: str = "") -> None:
        """The first message of `kind` is held up until `act` has been done. With `status`, the first that says so."""
        done: list[bool] = []

        def hook(message: Request | Reply) -> int:
            if not done and isinstance(message, kind) and status in ("", getattr(message, "status", "")):
                done.append(True)
                act()
            return 1

        self.hook = hook

    def say(self, message: Request) -> None:
        """To the owner, as one of the fleet. For the hook."""
        self._back(b"somebody").send(self._codec.encode(message))

    def _asked(self, client: bytes, frames: list[bytes]) -> None:
        (frame,) = frames
        self._hold(self._codec.request(frame), frame, self._back(client).send)

    def _answered(self, client: bytes, frames: list[bytes]) -> None:
        (frame,) = frames
        self._hold(self._codec.reply(frame), frame, lambda out: self._front.send_multipart([client, out]))

    def _hold(self, message: Request | Reply, frame: bytes, send: Callable[[bytes], object]) -> None:
        self.seen.append(type(message).__name__)
        for _ in range(self.hook(message)):
            due = time.monotonic() + self.delay(message)
            self._held.append((due, partial(send, self.frame_of(message, frame))))

    def _deliver(self) -> None:
        now, held = time.monotonic(), self._held
        self._held = [each for each in held if each[0] > now]
        for due, deliver in held:
            if due <= now:
                deliver()
