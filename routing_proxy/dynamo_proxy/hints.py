"""What an engine that runs our connector is told with a request: which other engine holds more of its prompt, and to
bring up early what lies deep in its own tiers. Pure.

Hints are guesses: what they are wrong about is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

PREFETCH = "kvbm_prefetch"
PEER = "kvbm_peer"
PEER_TOKENS = "kvbm_peer_tokens"
TELL_PEER = "kvbm_tell_peer"
HINT_KINDS = {"peer": PEER, "prefetch": PREFETCH}
#: Only proxies may say these: they lead an engine to another one, or make it tell its address.
OF_PROXIES = frozenset((PEER, PEER_TOKENS, TELL_PEER))
#: A peer that holds less than so many tokens more is not worth a question.
LEAST_GAIN_TOKENS = 256

Hints = Mapping[str, bool | str | int]
NO_HINTS: Hints = MappingProxyType({})


class Reach(NamedTuple):
    """How many of a prompt's leading tokens an engine holds: in any tier, in HBM or host memory, and in host memory,
    where its peers can read them.
    """

    everywhere: int
    near: int
    host: int


def choose_hints(slot: int, reaches: Mapping[int, Reach], names: Mapping[int, str], is_queued: bool) -> Hints:
    """What the engine of `slot` is told. `names` are the engines that may be named as peers."""
    own = reaches.get(slot, Reach(0, 0, 0))
    hints: dict[str, bool | str | int] = {}
    if is_queued and own.everywhere > own.near:
        hints[PREFETCH] = True
    there = {peer: reaches[peer].host for peer in names if peer != slot and peer in reaches}
    peer = max(there, key=lambda each: there[each], default=slot)
    if peer != slot and there[peer] - own.everywhere >= LEAST_GAIN_TOKENS:
        hints |= {PEER: names[peer], PEER_TOKENS: there[peer]}
    return hints
