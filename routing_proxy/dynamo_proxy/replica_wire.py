"""What replicas of the proxy tell each other: datagrams with a signature, a life, a number and the time. Pure.

A datagram holds a part of its sender's own loads, engine by engine, of the chains that it sent lately, or of what it
granted to keys that have limits. Loads and grants are whole values: a datagram that is lost is made good by the next
one. Nothing is ever asked back.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from .ledger import Counts

_VERSION = 2
_SIGNATURE_BYTES = 16
_MAX_SKEW_SECONDS = 30.0  # between two hosts' clocks; it bounds how long a recorded datagram can be played again
_ENGINES_PER_DATAGRAM = 24
_NODES_PER_DATAGRAM = 120  # so that a datagram fits an Ethernet frame
_MAX_NODES = 4096
_SPENT_PER_DATAGRAM = 24
_decode = msgspec.msgpack.Decoder().decode


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


class News(NamedTuple):
    """One datagram. `life` is when its sender started, `number` counts its datagrams from there."""

    sender: str
    life: int
    number: int
    wall_seconds: float
    loads: tuple[tuple[str, Counts], ...]
    chains: tuple[Chain, ...]
    spent: tuple[Spent, ...] = ()


def sign(news: News, key: bytes) -> bytes:
    """The bytes to send."""
    loads = [(engine, *counts) for engine, counts in news.loads]
    said = msgspec.msgpack.encode((_VERSION, *news[:4], loads, news.chains, news.spent))
    return _signature(said, key) + said


def verify(datagram: bytes, key: bytes, wall_seconds: float) -> News | str:
    """The news in a datagram, or a short reason why it is none."""
    signature, said = datagram[:_SIGNATURE_BYTES], datagram[_SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, _signature(said, key)):
        return "bad_signature"
    try:
        version, *rest = _decode(said)
        if version != _VERSION:
            return "other_version"
        sender, life, number, wall, loads, chains, spent = rest
        if abs(wall - wall_seconds) > _MAX_SKEW_SECONDS:
            return "too_old"
        told = tuple(map(_load, loads)), tuple(map(_chain, chains)), tuple(map(_spent, spent))
        return News(sender, life, number, wall, *told)
    except (msgspec.DecodeError, ValueError, TypeError, UnicodeDecodeError):
        return "malformed"


def _load(raw: Sequence[Any]) -> tuple[str, Counts]:
    engine, in_flight, pending, active = raw
    if not isinstance(engine, str) or min(in_flight, pending, active) < 0:
        raise ValueError("a load is not a name and three counts")
    return engine, Counts(int(in_flight), int(pending), int(active))


def _chain(raw: Sequence[Any]) -> Chain:
    engine, nodes = raw
    if not isinstance(engine, str) or not all(type(node) is int for node in nodes):
        raise ValueError("a chain is not a name and numbers")
    return Chain(engine, tuple(nodes[:_MAX_NODES]))


def _spent(raw: Sequence[Any]) -> Spent:
    key, what, total, left = raw
    if type(key) is not int or not isinstance(what, str) or not math.isfinite(total) or not math.isfinite(left):
        raise ValueError("what was granted is not a key, a name and two numbers")
    return Spent(key, what, total, left)


def _signature(said: bytes, key: bytes) -> bytes:
    return hmac.digest(key, said, hashlib.sha256)[:_SIGNATURE_BYTES]


def parcels(
    loads: Sequence[tuple[str, Counts]], chains: Sequence[Chain], spent: Sequence[Spent] = ()
) -> Iterator[tuple[tuple[tuple[str, Counts], ...], tuple[Chain, ...], tuple[Spent, ...]]]:
    """What there is to tell in portions of a datagram each. A long chain keeps its beginning."""
    for start in range(0, len(loads), _ENGINES_PER_DATAGRAM):
        yield tuple(loads[start : start + _ENGINES_PER_DATAGRAM]), (), ()
    for start in range(0, len(spent), _SPENT_PER_DATAGRAM):
        yield (), (), tuple(spent[start : start + _SPENT_PER_DATAGRAM])
    portion: list[Chain] = []
    held = 0
    for engine, nodes in chains:
        nodes = nodes[:_NODES_PER_DATAGRAM]
        if held + len(nodes) > _NODES_PER_DATAGRAM:
            yield (), tuple(portion), ()
            portion, held = [], 0
        portion.append(Chain(engine, nodes))
        held += len(nodes)
    if portion:
        yield (), tuple(portion), ()


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
