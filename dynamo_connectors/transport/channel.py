"""Who does not have the secret gets no message through: CURVE keys of ZeroMQ that follow from it.

A stranger's connection ends in the handshake, whose frames have a fixed size, so nothing of his is kept. The key that a
client must know to begin with is public in name only: it is derived from the secret and never sent.
"""

from __future__ import annotations

import hmac
from typing import Any

import zmq
from zmq.utils import z85

from dynamo_connectors.errors import ConfigError
from dynamo_connectors.transport.messages import MOST_FRAME_BYTES

_WRONG_KEY = int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC)
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH


def serve(socket: zmq.Socket[Any], secret: bytes) -> zmq.Socket[Any]:
    """Before `bind`. Returns the socket that tells of refused connections, see `refusals`."""
    _bound(socket)
    socket.curve_server = True
    socket.curve_secretkey = _server_key(secret)
    return socket.get_monitor_socket(_REFUSED)


def connect(socket: zmq.Socket[Any], secret: bytes) -> None:
    """Before `connect`."""
    _bound(socket)
    socket.curve_serverkey = zmq.curve_public(_server_key(secret))
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()


def refusals(monitor: zmq.Socket[Any]) -> list[str]:
    """Why connections were refused since the last call: `wrong_secret`, or `garbled` for what speaks otherwise."""
    reasons = []
    while monitor.poll(0):
        event, _ = monitor.recv_multipart()
        value = int.from_bytes(event[2:6], "little")
        reasons.append("wrong_secret" if value == _WRONG_KEY else "garbled")
    return reasons


def require_curve() -> None:
    """Raises `ConfigError` where ZeroMQ was built without libsodium."""
    if not zmq.has("curve"):
        raise ConfigError(
            "--kvbm-role needs ZeroMQ with CURVE, which this pyzmq lacks: pip install --force-reinstall pyzmq"
        )


def _bound(socket: zmq.Socket[Any]) -> None:
    require_curve()
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MOST_FRAME_BYTES)


def _server_key(secret: bytes) -> bytes:
    # No frame of `messages`, and no ticket, begins like it.
    return z85.encode(hmac.digest(secret, b"curve server", "sha256"))
