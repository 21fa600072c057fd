"""What an engine that runs our connector is told with a request: which other engine holds more of its prompt, and to
bring up early what lies deep in its own tiers. Pure.

Hints are guesses: what they are wrong about is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

PREFETCH = "kvbm_prefetch"
PEER = "kvbm_peer"
PEER_TOKENS = "kvbm_peer_tokens"
TELL_PEER = "kvbm_tell_peer"
HINT_KINDS = {"peer": PEER, "prefetch": PREFETCH}
#: Only proxies may say these: they lead an engine to another one, or make it tell its address.
OF_PROXIES = frozenset((PEER, PEER_TOKENS, TELL_PEER))
#: A peer that holds less than so many tokens more is not worth a question.
LEAST_GAIN_TOKENS: Final = 256
_NOBODY = (0, -1)

Hints = Mapping[str, bool | str | int]
NO_HINTS: Final[Hints] = MappingProxyType({})


class Reach(NamedTuple):
    """How many of a prompt's leading tokens an engine holds: in any tier, in HBM or host memory, and in host memory,
    where its peers can read them.
    """

    everywhere: int
    near: int
    host: int


NO_REACHES: Final[Mapping[int, Reach]] = MappingProxyType({})


def gains(readers: Iterable[int], reaches: Mapping[int, Reach], names: Iterable[int]) -> dict[int, int]:
    """How many tokens more than itself a peer of each reader holds, where it is worth a question."""
    first, second = (
        [*sorted(((reaches[peer].host, peer) for peer in names if peer in reaches), reverse=True), _NOBODY, _NOBODY]
    )[:2]
    found = {}
    for slot in readers:
        there, _ = second if first[1] == slot else first
        more = there - (reaches[slot].everywhere if slot in reaches else 0)
        if more >= LEAST_GAIN_TOKENS:
            found[slot] = more
    return found


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
