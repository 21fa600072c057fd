"""What the limits of keys granted, here and at other proxies: each charges its own buckets what all of them grant.

A proxy tells of each bucket what it granted itself since its start, as a whole, and what is left; so a word that is
lost is made good by the next one about the same key.
"""

from __future__ import annotations

from collections.abc import Iterable

from .api_keys import Caller, KeyRing
from .replica_wire import Spent


class Spending:
    """The spending of all keys that have limits."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys
        self._fresh: set[Caller] = set()  # spent something that the others do not know of
        self._totals: dict[str, dict[tuple[int, str], float]] = {}  # what each other proxy last said

    @property
    def proxies(self) -> tuple[str, ...]:
        """The other proxies that told of theirs."""
        return tuple(self._totals)

    def granted(self, caller: Caller) -> None:
        """A caller with limits got something here."""
        self._fresh.add(caller)

    def tell_all(self) -> None:
        """Another proxy is new: it does not know what is used up."""
        self._fresh.update(caller for caller in self._keys if caller.limits.in_use)

    def news(self, now: float) -> list[Spent]:
        """What the others do not know."""
        if not self._fresh:
            return []
        fresh, self._fresh = self._fresh, set()
        return [
            Spent(caller.number, what, bucket.granted, bucket.level_at(now))
            for caller in fresh
            for what, bucket in caller.limits.buckets()
        ]

    def told(self, proxy: str, spent: Iterable[Spent], now: float) -> None:
        """Another proxy says what it granted; its first word about a bucket, how much is left as far as it knows."""
        totals = self._totals.setdefault(proxy, {})
        for number, what, total, left in spent:
            caller = self._keys.numbered(number)
            bucket = dict(caller.limits.buckets()).get(what) if caller is not None else None
            if bucket is None:
                continue
            before = totals.get((number, what))
            if before is None:
                bucket.charge(max(0.0, bucket.level_at(now) - left), now)
            else:
                bucket.charge(total - before, now)
            totals[number, what] = total

    def forget(self, proxy: str) -> None:
        """Another proxy is gone; what it granted stays charged."""
        self._totals.pop(proxy, None)
