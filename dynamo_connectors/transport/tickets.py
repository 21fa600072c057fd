"""What a reader needs to find the blocks that an owner keeps for it. Pure."""

from __future__ import annotations

import hmac
from typing import Annotated

import msgspec

from dynamo_connectors.errors import StoreError
from dynamo_connectors.transport.messages import Lease


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """`port` is that of the owner's first worker; the others listen on the next ones.

    `workers`: how many there are, or 0 for as many as the reader's engine has.
    """

    host: Annotated[str, msgspec.Meta(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9_.:-]+\Z")]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    lease: Lease
    workers: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    def signature(self, secret: bytes, tokens: int) -> bytes:
        """Proves that one of the fleet offers these `tokens`: tickets come with requests, so from anybody."""
        # No frame of `messages` begins like it.
        return hmac.digest(secret, b"ticket" + msgspec.msgpack.encode((self, tokens)), "sha256")

    @classmethod
    def decode(cls, encoded: bytes) -> Ticket:
        """Raises `StoreError`."""
        try:
            return msgspec.msgpack.decode(encoded, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StoreError("bad_ticket", str(error)) from None

    def address_of(self, rank: int) -> str:
        """Where worker `rank` of the owner listens."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port + rank}"
