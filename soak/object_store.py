"""A real S3 server as a child, and a pipe before it that can be broken in every way a network can."""

from __future__ import annotations

import random
import re
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path

from tools.server_process import ServerProcess, free_port

BUCKET = "soak"
#: moto takes any; the client library asks for some.
SECRETS = {"AWS_ACCESS_KEY_ID": "soak", "AWS_SECRET_ACCESS_KEY": "soak", "AWS_DEFAULT_REGION": "us-east-1"}
MODES = ("fine", "refuse", "hang", "slow", "cut", "flip", "busy", "lose")
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


def s3_server(log: Path) -> ServerProcess:
    """moto, not started yet."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"PYTHONWARNINGS": "ignore"}
    return ServerProcess("s3", command, f"http://127.0.0.1:{port}", log, quiet, health_path="/moto-api/")


def make_bucket(url: str) -> None:
    urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT"), timeout=10).close()


class BreakablePipe:
    """Listens on `url` and passes every connection on to `target_port`, as `mode` says at that moment.

    refuse: closes at once. hang: takes everything, says nothing. slow: answers 200 bytes a second. cut: closes in the
    middle of an answer. flip: changes a byte of every answer's later part. busy: answers 503. lose: closes in the
    middle of an upload.
    """

    def __init__(self, target_port: int) -> None:
        self.mode = "fine"
        self.lost_uploads = 0
        self._target_port = target_port
        self._rng = random.Random(5)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            if self.mode == "refuse":
                return
            if self.mode == "busy":
                client.recv(65536)
                client.sendall(b"HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                return
            try:
                with socket.create_connection(("127.0.0.1", self._target_port), timeout=10) as server:
                    up = threading.Thread(target=self._copy, args=(client, server), daemon=True)
                    up.start()
                    self._answer(server, client)
                    up.join(1)
            except OSError:
                return

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if self.mode == "lose" and data.startswith(b"PUT "):
                    self._lose(data, source, target)
                    return
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def _lose(self, data: bytes, source: socket.socket, target: socket.socket) -> None:
        """Passes the head of an upload on and half of its body, and is gone; of the answer nobody hears."""
        length = _LENGTH.search(data)
        left = data.find(b"\r\n\r\n") + 4 + (int(length[1]) // 2 if length else 0)
        while left > 0 and data:
            target.sendall(data[:left])
            left -= len(data)
            data = source.recv(65536) if left > 0 else b""
        self.lost_uploads += 1
        source.shutdown(socket.SHUT_RDWR)
        target.shutdown(socket.SHUT_WR)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        server.settimeout(120)
        while data := server.recv(65536):
            while self.mode == "hang":
                time.sleep(0.2)
            if self.mode == "slow":
                for start in range(0, len(data), 200):
                    client.sendall(data[start : start + 200])
                    if self.mode == "slow":
                        time.sleep(1)
                continue
            if self.mode == "flip" and len(data) > 2000:
                position = self._rng.randrange(1000, len(data))
                data = data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]
            if self.mode == "cut":
                client.sendall(data[: len(data) // 2])
                return
            client.sendall(data)
