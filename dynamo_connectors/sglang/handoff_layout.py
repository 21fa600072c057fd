"""Where an SGLang engine keeps the KV of a page and a request's metadata, and what a READ between two engines is. Pure.

A slot is a page of KV over all layers, or, beyond the pages, a request's row of metadata: all that the engine itself
sends along with the KV (first token, logprobs, room).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import msgspec

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import ConfigError, StoreError

_MOST_BUFFERS = 4096
Address = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Length = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
Addresses = Annotated[tuple[Address, ...], msgspec.Meta(max_length=_MOST_BUFFERS)]
Lengths = Annotated[tuple[Length, ...], msgspec.Meta(max_length=_MOST_BUFFERS)]
#: The name of a request's row of metadata in its lease.
METADATA_KEY = BlockKey(b"metadata")


def page_key(position: int) -> BlockKey:
    """The name of a prompt's page in its lease."""
    return BlockKey(position.to_bytes(4, "big"))


class EngineLayout(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Buffers of one engine's worker: item `i` of a buffer lies `i * item_bytes` behind its beginning."""

    pages: Length
    page_buffers: Addresses
    page_bytes: Lengths
    metadata_rows: Length
    metadata_buffers: Addresses
    metadata_bytes: Lengths

    @property
    def slots(self) -> int:
        return self.pages + self.metadata_rows

    @property
    def row_bytes(self) -> int:
        """Of a page: what both sides must agree on first."""
        return sum(self.page_bytes)

    def metadata_slot(self, row: int) -> int:
        return self.pages + row

    def fits(self, other: EngineLayout) -> bool:
        """Whether what one keeps is what the other keeps."""
        return (self.page_bytes, self.metadata_bytes) == (other.page_bytes, other.metadata_bytes)

    def regions(self) -> list[tuple[int, int]]:
        """Address and bytes of each buffer."""
        pages = [(at, self.pages * size) for at, size in zip(self.page_buffers, self.page_bytes, strict=True)]
        rows = zip(self.metadata_buffers, self.metadata_bytes, strict=True)
        return pages + [(at, self.metadata_rows * size) for at, size in rows]

    def check(self) -> None:
        assert len(self.page_buffers) == len(self.page_bytes), "a buffer of pages without its size"
        assert len(self.metadata_buffers) == len(self.metadata_bytes), "a buffer of metadata without its size"


class Welcome(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a prefill worker tells of itself in place of NIXL's bare metadata."""

    agent: Annotated[bytes, msgspec.Meta(max_length=1 << 19)]
    layout: EngineLayout

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, encoded: bytes) -> Welcome:
        """Raises `StoreError`."""
        try:
            welcome = msgspec.msgpack.decode(encoded, type=cls)
            welcome.layout.check()
        except (msgspec.DecodeError, UnicodeDecodeError, AssertionError) as error:
            raise StoreError("bad_metadata", f"what the peer says of its buffers cannot be read ({error})") from None
        return welcome


def layout_of(pages: Sequence[tuple[int, int, int]], metadata: Sequence[tuple[int, int, int]]) -> EngineLayout:
    """From (address, bytes, bytes of an item) of each buffer. Raises `ConfigError`."""
    if not pages or any(size < 1 or length < size for _, length, size in [*pages, *metadata]):
        raise ConfigError("this engine keeps no KV in pages that could be handed over; use another transfer backend")
    return EngineLayout(
        pages=min(length // size for _, length, size in pages),
        page_buffers=tuple(at for at, _, _ in pages),
        page_bytes=tuple(size for _, _, size in pages),
        metadata_rows=min(length // size for _, length, size in metadata),
        metadata_buffers=tuple(at for at, _, _ in metadata),
        metadata_bytes=tuple(size for _, _, size in metadata),
    )


def pieces(
    here: EngineLayout, there: EngineLayout, mine: Sequence[int], theirs: Sequence[int]
) -> tuple[list[int], list[int], list[int]] | None:
    """Addresses here and there, and bytes, that move slots `theirs` into slots `mine`. None for a slot that is none."""
    local: list[int] = []
    remote: list[int] = []
    sizes: list[int] = []
    for first, count in _runs(mine, theirs):
        my_slot, their_slot = mine[first], theirs[first]
        if my_slot < 0 or their_slot < 0 or (my_slot < here.pages) != (their_slot < there.pages):
            return None
        if my_slot < here.pages:
            if my_slot + count > here.pages or their_slot + count > there.pages:
                return None
            buffers = zip(here.page_buffers, there.page_buffers, here.page_bytes, strict=True)
        else:
            my_slot, their_slot = my_slot - here.pages, their_slot - there.pages
            if my_slot + count > here.metadata_rows or their_slot + count > there.metadata_rows:
                return None
            buffers = zip(here.metadata_buffers, there.metadata_buffers, here.metadata_bytes, strict=True)
        for my_base, their_base, size in buffers:
            local.append(my_base + my_slot * size)
            remote.append(their_base + their_slot * size)
            sizes.append(count * size)
    return local, remote, sizes


def _runs(mine: Sequence[int], theirs: Sequence[int]) -> list[tuple[int, int]]:
    """(first, count) of neighbours that are neighbours on both sides."""
    starts = [0] if mine else []
    steps = zip(pairwise(mine), pairwise(theirs), strict=True)
    starts += [at + 1 for at, ((a, b), (c, d)) in enumerate(steps) if b - a != 1 or d - c != 1]
    return [(start, end - start) for start, end in zip(starts, [*starts[1:], len(mine)], strict=True)]
