"""Several pools under one GPU budget: how many replicas each may have. Pure.

Minimums come first. When the wishes do not fit, every pool gives up in proportion to its wish above the minimum, so
that prefill and decode stay in step: a pool that starves throttles the other one too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Wish:
    """What one pool has, wants and needs at least, in replicas of `gpus` each."""

    current: int
    wanted: int
    minimum: int
    gpus: int = 1


def ceilings(wishes: Mapping[str, Wish], max_gpus: int | None) -> dict[str, int | None]:
    """The most replicas each pool may go up to; None: no limit. A pool that is above its ceiling keeps what it has:
    the ceiling bounds growth, and the sum never passes the budget through growth.
    """
    if max_gpus is None:
        return dict.fromkeys(wishes)
    wanted = {name: max(wish.wanted, wish.minimum) for name, wish in wishes.items()}
    if sum(wanted[name] * wish.gpus for name, wish in wishes.items()) > max_gpus:
        wanted = _scaled(wishes, wanted, max_gpus)
    return dict(_granted(wishes, wanted, max_gpus))


def _scaled(wishes: Mapping[str, Wish], wanted: Mapping[str, int], max_gpus: int) -> dict[str, int]:
    """Minimums, then the same share of every wish above it, then what is left by the largest shortfall."""
    floor = sum(wish.minimum * wish.gpus for wish in wishes.values())
    above = sum((wanted[name] - wish.minimum) * wish.gpus for name, wish in wishes.items())
    share = max(0.0, (max_gpus - floor) / above) if above else 0.0
    given = {name: wish.minimum + math.floor((wanted[name] - wish.minimum) * share) for name, wish in wishes.items()}
    left = max_gpus - sum(given[name] * wish.gpus for name, wish in wishes.items())
    while True:
        short = [
            (given[name] / wanted[name], name)
            for name, wish in sorted(wishes.items())
            if given[name] < wanted[name] and wish.gpus <= left
        ]
        if not short:
            return given
        name = min(short)[1]
        given[name] += 1
        left -= wishes[name].gpus


def _granted(wishes: Mapping[str, Wish], wanted: Mapping[str, int], max_gpus: int) -> dict[str, int]:
    """Growth only into GPUs that are free now: a pool that shrinks gives its GPUs up when its replicas are gone."""
    free = max_gpus - sum(max(wish.current, 0) * wish.gpus for wish in wishes.values())
    granted = {}
    grows = {name: wanted[name] - wish.current for name, wish in wishes.items()}
    for name, wish in wishes.items():
        granted[name] = wanted[name] if grows[name] <= 0 else wish.current
    while True:
        hungry = [
            (granted[name] / wanted[name], name)
            for name, wish in sorted(wishes.items())
            if granted[name] < wanted[name] and grows[name] > 0 and wish.gpus <= free
        ]
        if not hungry:
            return granted
        name = min(hungry)[1]
        granted[name] += 1
        free -= wishes[name].gpus
