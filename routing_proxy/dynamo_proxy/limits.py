"""Rates per caller: token buckets over a minute. Pure: the clock is an argument."""

from __future__ import annotations

import math
from dataclasses import dataclass

_MINUTE_SECONDS = 60.0


@dataclass(slots=True)
class Bucket:
    """`per_minute` may be spent at once and comes back evenly. It may go into debt: what an answer costs is known
    only when it is over. `granted` is what was spent here, not at another proxy.
    """

    per_minute: float
    level: float
    at: float
    granted: float = 0.0

    @classmethod
    def full(cls, per_minute: float, now: float) -> Bucket:
        return cls(per_minute, per_minute, now)

    def wait_seconds(self, amount: float, now: float) -> float:
        """How long until `amount` is there; 0: it is there now."""
        missing = min(amount, self.per_minute) - self.level_at(now)
        return missing * _MINUTE_SECONDS / self.per_minute if missing > 0 else 0.0

    def spend(self, amount: float, now: float) -> None:
        """Charge what is granted here; less than nothing, if it was less than expected."""
        self.charge(amount, now)
        self.granted += amount

    def charge(self, amount: float, now: float) -> None:
        self.level = min(self.per_minute, self.level_at(now) - amount)

    def level_at(self, now: float) -> float:
        gained = (now - self.at) * self.per_minute / _MINUTE_SECONDS
        self.level, self.at = min(self.per_minute, self.level + gained), now
        return self.level

    def check(self) -> None:
        assert self.level <= self.per_minute, "more is left than there ever was"


@dataclass(slots=True)
class CallerLimits:
    """What one caller may use; None: as much as it wants."""

    requests: Bucket | None = None
    tokens: Bucket | None = None

    def buckets(self) -> list[tuple[str, Bucket]]:
        named = (("requests", self.requests), ("tokens", self.tokens))
        return [(what, bucket) for what, bucket in named if bucket is not None]

    @property
    def in_use(self) -> bool:
        """True if something was spent that may not be back."""
        return any(bucket.level < bucket.per_minute for _, bucket in self.buckets())

    def take(self, prompt_tokens: int, now: float) -> float:
        """Charge a request and its prompt. Returns 0, or the seconds to wait; then nothing was charged."""
        waits = [
            bucket.wait_seconds(amount, now)
            for bucket, amount in ((self.requests, 1), (self.tokens, max(1, prompt_tokens)))
            if bucket is not None
        ]
        wait = max(waits, default=0.0)
        if wait > 0:
            return math.ceil(wait * 1000) / 1000
        if self.requests is not None:
            self.requests.spend(1, now)
        if self.tokens is not None:
            self.tokens.spend(prompt_tokens, now)
        return 0.0

    def check(self) -> None:
        for _, bucket in self.buckets():
            bucket.check()
