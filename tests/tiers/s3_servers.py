"""Two S3 services on this machine: moto, which is a real one, and one that misbehaves as told."""

from __future__ import annotations

import logging
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import obstore
from moto.server import ThreadedMotoServer
from obstore.store import S3Store

BUCKET = "kvbm"
#: Never in a log or an error: a test looks.
SECRET = "s3cr3t-key-of-the-tests"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTS",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_REGION": "us-east-1",
    "NO_PROXY": "*",
}


class Moto:
    """A running moto and the objects in its one bucket."""

    def __init__(self, url: str) -> None:
        self.url = url

    @property
    def bucket(self) -> S3Store:
        return S3Store(BUCKET, endpoint=self.url, client_options={"allow_http": True})

    def names(self) -> list[str]:
        return [entry["path"] for page in obstore.list(self.bucket) for entry in page]

    def get(self, name: str) -> bytearray:
        return bytearray(obstore.get(self.bucket, name).bytes())

    def put(self, name: str, body: bytes | bytearray) -> None:
        obstore.put(self.bucket, name, bytes(body))

    def delete_all(self) -> None:
        if names := self.names():
            obstore.delete(self.bucket, names)

    @contextmanager
    def refusing_everybody(self) -> Iterator[None]:
        """Nobody's credentials are good any more."""
        self._count_free_actions("0")
        try:
            yield
        finally:
            self._count_free_actions("inf")

    def _count_free_actions(self, count: str) -> None:
        # Not as a form, which urllib would say and flask would take apart.
        text = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{self.url}/moto-api/reset-auth", count.encode(), text, method="POST")
        urllib.request.urlopen(request).close()


@contextmanager
def moto_server() -> Iterator[Moto]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        create = urllib.request.Request(f"{url}/{BUCKET}", method="PUT", headers={"Host": "s3.amazonaws.com"})
        urllib.request.urlopen(create).close()
        yield Moto(url)
    finally:
        server.stop()


#: Answers one request: the connection, and the request's first line.
Behaviour = Callable[[socket.socket, str], None]


class FaultServer:
    """Hands every connection to `behave` on a thread of its own. `left` has one permit per peer that hung up first."""

    def __init__(self, behave: Behaviour) -> None:
        self.behave = behave
        self.requests: list[str] = []
        self.left = threading.Semaphore(0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        for end in (self._listener, *self._connections):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it has ended already
        for thread in list(self._threads):
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                request = b""
                while b"\r\n\r\n" not in request:
                    request += connection.recv(65536) or b"\r\n\r\n"
                first_line = request.split(b"\r\n")[0].decode()
                self.requests.append(first_line)
                self.behave(connection, first_line)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass
            except OSError:
                self.left.release()


def answer(status: str, body: bytes = b"", length: int | None = None, extra: str = "") -> bytes:
    """A response; `length` is what it claims to be long."""
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body) if length is None else length}\r\nConnection: close\r\n"
    return head.encode() + extra.encode() + b"\r\n" + body


def part(body: bytes, start: int = 0, total: int | None = None, length: int | None = None) -> bytes:
    """A well-formed answer to a ranged GET."""
    end = start + (len(body) if length is None else length) - 1
    extra = (
        f"Content-Range: bytes {start}-{end}/{end + 1 if total is None else total}\r\n"
        'ETag: "1"\r\nLast-Modified: Sun, 22 Nov 2026 07:00:00 GMT\r\n'
    )
    return answer("206 Partial Content", body, length, extra)


def hang(connection: socket.socket, request: str) -> None:
    """Says nothing until the peer hangs up."""
    while connection.recv(65536):
        pass
    raise ConnectionError("the peer has left")


def trickle(beginning: bytes) -> Behaviour:
    """Sends `beginning`, then one byte after the other, for ever."""

    def behave(connection: socket.socket, request: str) -> None:
        connection.sendall(beginning)
        pause = threading.Event()
        while True:
            connection.sendall(b"x")
            pause.wait(0.005)

    return behave


def say(response: bytes) -> Behaviour:
    return lambda connection, request: connection.sendall(response)
