"""The reader's side of the control connections: one socket per peer, and a bell for other threads. One thread."""

from __future__ import annotations

import errno
import logging
import time
from typing import Any

import zmq

from dynamo_connectors.transport import channel
from dynamo_connectors.transport.bell import Bell

log = logging.getLogger(__name__)

#: Frames that wait for a peer that does not listen; what comes beyond is dropped, and said again by the protocol.
_MOST_WAITING = 256
#: Peers that a reader is connected to. One is dropped for the next, and met anew when it is needed again.
_MOST_PEERS = 256


class PeerSockets:
    """Peers go by their address, `tcp://host:port`."""

    def __init__(self, secret: bytes) -> None:
        channel.require_curve()  # here, where somebody hears of it, and not when the first peer is met
        self._secret = secret
        self._context: zmq.Context[Any] = zmq.Context()
        self._sockets: dict[str, zmq.Socket[Any]] = {}
        self._poller = zmq.Poller()
        self._bell = Bell()
        self._poller.register(self._bell.fd, zmq.POLLIN)

    def wake(self) -> None:
        """From any thread: `receive` returns."""
        self._bell.ring()

    def send(self, peer: str, frame: bytes) -> None:
        socket = self._sockets.get(peer)
        if socket is None:
            socket = self._connect(peer)
        if socket is None:
            return
        try:
            socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return  # the protocol says it again

    def receive(self, seconds: float) -> list[tuple[str, bytes]]:
        """Frames that have come, by peer. Waits at most so long for the first one, or for `wake`."""
        if seconds < 0.001:  # less than the poller can wait
            time.sleep(seconds)
            seconds = 0.0
        ready = dict(self._poller.poll(int(seconds * 1000)))
        if self._bell.fd in ready:
            self._bell.hush()
        frames: list[tuple[str, bytes]] = []
        for peer, socket in self._sockets.items():
            if socket not in ready:
                continue
            try:
                while True:
                    frames.append((peer, socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                continue
        return frames

    def drop(self, peer: str) -> None:
        """Hangs up."""
        socket = self._sockets.pop(peer, None)
        if socket is not None:
            self._poller.unregister(socket)
            socket.close(linger=0)

    def close(self) -> None:
        self._bell.close()
        self._context.destroy(linger=0)

    def _connect(self, peer: str) -> zmq.Socket[Any] | None:
        if len(self._sockets) >= _MOST_PEERS:
            self.drop(next(iter(self._sockets)))
        socket: zmq.Socket[Any] | None = None
        try:
            socket = self._context.socket(zmq.DEALER)
            channel.connect(socket, self._secret)
            socket.setsockopt(zmq.SNDHWM, _MOST_WAITING)
            socket.setsockopt(zmq.IPV6, 1)
            socket.connect(peer)
        except (zmq.ZMQError, ValueError) as error:  # no address, no descriptor left: the protocol finds nobody there
            if getattr(error, "errno", None) == errno.EMFILE:
                log.warning("dynamo: no connection to peer %s (%s); raise the limit of open files", peer, error)
            if socket is not None:
                socket.close(linger=0)
            return None
        self._sockets[peer] = socket
        self._poller.register(socket, zmq.POLLIN)
        return socket
