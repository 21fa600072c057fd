"""What replicas of the proxy tell each other: datagrams with a signature, a life, a number and the time. Pure.

A datagram holds a part of its sender's own loads, engine by engine, of the chains that it sent lately, of what it
granted to keys that have limits, or of the engines that it placed sessions at. Loads and grants are whole values: a
datagram that is lost is made good by the next one. Nothing is ever asked back.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec

from .ledger import Counts

_VERSION = 3
_SIGNATURE_BYTES = 16
_MAX_SKEW_SECONDS = 30.0  # between two hosts' clocks; it bounds how long a recorded datagram can be played again
_ENGINES_PER_DATAGRAM = 24
_NODES_PER_DATAGRAM = 120  # so that a datagram fits an Ethernet frame
_MAX_NODES = 4096
_SPENT_PER_DATAGRAM = 24
_HOMES_PER_DATAGRAM = 16
_Count = Annotated[int, msgspec.Meta(ge=0)]
_Said = tuple[
    int, str, int, int, float, list[tuple[str, _Count, _Count, _Count]], list[tuple[str, list[_Count]]],
    list[tuple[int, str, float, float]], list[tuple[_Count, str]],
]  # fmt: skip
_decode = msgspec.msgpack.Decoder(_Said).decode
_decode_any = msgspec.msgpack.Decoder(list[Any]).decode


class Chain(NamedTuple):
    """A prompt that was sent to an engine."""

    engine: str
    nodes: tuple[int, ...]


class Spent(NamedTuple):
    """What one limit of one key granted at the sender since its start, and what it takes to be left of it."""

    key: int
    what: str
    total: float
    left: float


class Home(NamedTuple):
    """Where a session went last."""

    session: int
    engine: str


class News(NamedTuple):
    """One datagram. `life` is when its sender started, `number` counts its datagrams from there."""

    sender: str
    life: int
    number: int
    wall_seconds: float
    loads: tuple[tuple[str, Counts], ...]
    chains: tuple[Chain, ...]
    spent: tuple[Spent, ...] = ()
    homes: tuple[Home, ...] = ()


def sign(news: News, key: bytes) -> bytes:
    """The bytes to send."""
    loads = [(engine, *counts) for engine, counts in news.loads]
    said = msgspec.msgpack.encode((_VERSION, *news[:4], loads, news.chains, news.spent, news.homes))
    return _signature(said, key) + said


def verify(datagram: bytes, key: bytes, wall_seconds: float) -> News | str:
    """The news in a datagram, or a short reason why it is none."""
    signature, said = datagram[:_SIGNATURE_BYTES], datagram[_SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, _signature(said, key)):
        return "bad_signature"
    try:
        version, sender, life, number, wall, loads, chains, spent, homes = _decode(said)
    except msgspec.DecodeError:
        return "malformed" if _version(said) in (_VERSION, None) else "other_version"
    if version != _VERSION:
        return "other_version"
    if not abs(wall - wall_seconds) <= _MAX_SKEW_SECONDS:
        return "too_old"
    if not all(math.isfinite(total) and math.isfinite(left) for _, _, total, left in spent):
        return "malformed"
    told_loads = tuple((engine, Counts(*counts)) for engine, *counts in loads)
    told_chains = tuple(Chain(engine, tuple(nodes[:_MAX_NODES])) for engine, nodes in chains)
    told_spent, told_homes = tuple(Spent(*each) for each in spent), tuple(Home(*each) for each in homes)
    return News(sender, life, number, wall, told_loads, told_chains, told_spent, told_homes)


def _version(said: bytes) -> Any:
    try:
        return _decode_any(said)[0]
    except (msgspec.DecodeError, IndexError):
        return None


def _signature(said: bytes, key: bytes) -> bytes:
    return hmac.digest(key, said, hashlib.sha256)[:_SIGNATURE_BYTES]


Parcel = tuple[tuple[tuple[str, Counts], ...], tuple[Chain, ...], tuple[Spent, ...], tuple[Home, ...]]


def parcels(
    loads: Sequence[tuple[str, Counts]],
    chains: Sequence[Chain],
    spent: Sequence[Spent] = (),
    homes: Sequence[Home] = (),
) -> Iterator[Parcel]:
    """What there is to tell in portions of a datagram each. A long chain keeps its beginning."""
    for start in range(0, len(loads), _ENGINES_PER_DATAGRAM):
        yield tuple(loads[start : start + _ENGINES_PER_DATAGRAM]), (), (), ()
    for start in range(0, len(spent), _SPENT_PER_DATAGRAM):
        yield (), (), tuple(spent[start : start + _SPENT_PER_DATAGRAM]), ()
    for start in range(0, len(homes), _HOMES_PER_DATAGRAM):
        yield (), (), (), tuple(homes[start : start + _HOMES_PER_DATAGRAM])
    portion: list[Chain] = []
    held = 0
    for engine, nodes in chains:
        nodes = nodes[:_NODES_PER_DATAGRAM]
        if held + len(nodes) > _NODES_PER_DATAGRAM:
            yield (), tuple(portion), (), ()
            portion, held = [], 0
        portion.append(Chain(engine, nodes))
        held += len(nodes)
    if portion:
        yield (), tuple(portion), (), ()


class Order:
    """Which datagrams of each sender are new: a later life, or a higher number in the same one."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, int]] = {}

    def is_new(self, news: News) -> bool:
        here = (news.life, news.number)
        if here <= self._last.get(news.sender, (-1, -1)):
            return False
        self._last[news.sender] = here
        return True
