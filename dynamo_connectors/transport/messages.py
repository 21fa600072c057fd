"""What owner and reader of blocks say to each other, as authenticated, versioned and bounded frames. Pure.

Frame: `MAGIC`, one byte of version, an HMAC-SHA256 over version and body, the body. Nothing of the body is looked at
before the frame is proven, and a frame that is not what it should be is refused with a reason fit for a metric label.
"""

from __future__ import annotations

import hmac
from typing import Annotated, TypeAlias, TypeVar

import msgspec

from dynamo_connectors.errors import DynamoConnectorsError

Body = TypeVar("Body")

MAGIC = b"DYNP"
VERSION = 6
#: Above it a frame is not even read: a question about `MOST_BLOCKS` blocks takes less.
MOST_FRAME_BYTES = 2 << 20
MOST_BLOCKS = 16_384
LEASE_BYTES = 16
#: The lease of whatever an owner holds, which nobody is given: it never ends, and pins nothing.
STANDING_LEASE = bytes(LEASE_BYTES)
_MAC_BYTES = 32
_HEAD_BYTES = len(MAGIC) + 1

Name = Annotated[bytes, msgspec.Meta(max_length=128)]
Lease = Annotated[bytes, msgspec.Meta(min_length=LEASE_BYTES, max_length=LEASE_BYTES)]
Key = Annotated[bytes, msgspec.Meta(max_length=96)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Address = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
#: A slot, or -1 for a block that the lease does not hold.
Slot = Annotated[int, msgspec.Meta(ge=-1, le=1 << 40)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=600.0)]
Keys = Annotated[tuple[Key, ...], msgspec.Meta(max_length=MOST_BLOCKS)]
Slots = Annotated[tuple[Slot, ...], msgspec.Meta(max_length=MOST_BLOCKS)]
Generations = Annotated[tuple[Count, ...], msgspec.Meta(max_length=MOST_BLOCKS)]


class MessageError(DynamoConnectorsError):
    """A frame that is refused; `reason` is a short word fit for a metric label."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    pass


class Hello(_Message, frozen=True):
    """Reader: these are the bytes I can read; may I read yours? `nonce` is new for every attempt."""

    nonce: Count
    namespace: Name
    row_bytes: Count


class Ask(_Message, frozen=True):
    """Reader: where are these blocks of the lease? I give up on them in `seconds`."""

    reader: Name
    read: Count
    epoch: Name
    lease: Lease
    keys: Keys
    seconds: Seconds
    #: In the owner's window, or else in its host memory.
    in_window: bool = False


class Check(_Message, frozen=True):
    """Reader, after its READ, to an owner without words: do these slots still hold what you granted?"""

    reader: Name
    read: Count
    epoch: Name
    lease: Lease
    slots: Slots
    generations: Generations


class Done(_Message, frozen=True):
    """Reader: this READ is over. Not answered, and nobody waits for it."""

    reader: Name
    read: Count
    lease: Lease


class Renew(_Message, frozen=True):
    """Reader: I still want this lease."""

    lease: Lease


class Ping(_Message, frozen=True):
    """Reader: are you still there? Asked while a READ is under way, of which the owner sees nothing."""

    reader: Name


class End(_Message, frozen=True):
    """Reader: I want no more of this lease, and none of my READs of it is under way.

    It was given to `readers` of us, and ends when all have said so.
    """

    reader: Name
    lease: Lease
    readers: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] = 1


class WindowPlace(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Rows beside those in host memory, in the memory of the owner's GPU `device`; -1 where that is the host's."""

    base: Address
    rows: Count
    device: Annotated[int, msgspec.Meta(ge=-1, le=1 << 16)]


class WordsPlace(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where words of 8 bytes lie in the owner's host memory: `run`, and one for each slot and each row of the window.

    A slot's word is its generation, and is another one before anything is written to the slot. `run` is another one
    before the owner revokes all that it has granted.
    """

    run: Address
    slots: Address
    window: Address


class Welcome(_Message, frozen=True):
    """Owner: `epoch` is this run of mine; row `slot` lies at `base + slot * row_bytes` of agent `metadata`.

    Without `words` a reader has to ask whether what it has read still held.
    """

    nonce: Count
    namespace: Name
    epoch: Name
    metadata: Annotated[bytes, msgspec.Meta(max_length=1 << 20)]
    base: Address
    rows: Count
    row_bytes: Count
    window: WindowPlace | None = None
    words: WordsPlace | None = None


class Refuse(_Message, frozen=True):
    """Owner: you cannot read my blocks, and `detail` says why in one line."""

    nonce: Count
    reason: Annotated[str, msgspec.Meta(max_length=64)]
    detail: Annotated[str, msgspec.Meta(max_length=1000)]


class Grant(_Message, frozen=True):
    """Owner: `status` is granted (slots and generations, one per key asked), pending, unknown, gone or restarted.

    `run`: what the word of that name was.
    """

    reader: Name
    read: Count
    epoch: Name
    status: Annotated[str, msgspec.Meta(max_length=16)]
    slots: Slots = ()
    generations: Generations = ()
    run: Count = 0


class Verdict(_Message, frozen=True):
    """Owner: held, or why not."""

    reader: Name
    read: Count
    epoch: Name
    held: bool
    reason: Annotated[str, msgspec.Meta(max_length=64)] = ""


class Pong(_Message, frozen=True):
    """Owner: I am."""

    reader: Name


Request: TypeAlias = Hello | Ask | Check | Done | Renew | Ping | End
Reply: TypeAlias = Welcome | Refuse | Grant | Verdict | Pong


class Codec:
    """Makes and reads frames of peers that share `secret`."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._encoder = msgspec.msgpack.Encoder()
        self._requests = msgspec.msgpack.Decoder(Request)
        self._replies = msgspec.msgpack.Decoder(Reply)

    def encode(self, message: Request | Reply) -> bytes:
        body = bytes([VERSION]) + self._encoder.encode(message)
        return MAGIC + body[:1] + self._mac(body) + body[1:]

    def request(self, frame: bytes) -> Request:
        """Raises `MessageError`."""
        request: Request = self._read(frame, self._requests)
        return request

    def reply(self, frame: bytes) -> Reply:
        """Raises `MessageError`."""
        reply: Reply = self._read(frame, self._replies)
        return reply

    def _read(self, frame: bytes, decoder: msgspec.msgpack.Decoder[Body]) -> Body:
        if len(frame) > MOST_FRAME_BYTES:
            raise MessageError("too_large", f"{len(frame)} bytes")
        if len(frame) < _HEAD_BYTES + _MAC_BYTES or frame[: len(MAGIC)] != MAGIC:
            raise MessageError("not_ours", "no frame of this protocol")
        if frame[len(MAGIC)] != VERSION:
            raise MessageError("version", f"the peer speaks version {frame[len(MAGIC)]}, this one {VERSION}")
        mac, body = frame[_HEAD_BYTES : _HEAD_BYTES + _MAC_BYTES], frame[_HEAD_BYTES + _MAC_BYTES :]
        if not hmac.compare_digest(mac, self._mac(frame[len(MAGIC) : _HEAD_BYTES] + body)):
            raise MessageError("wrong_secret", "the frame is not signed with our secret")
        try:
            return decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise MessageError("garbled", str(error)) from None

    def _mac(self, body: bytes) -> bytes:
        return hmac.digest(self._secret, body, "sha256")
