"""The owner's half of the protocol: which blocks readers may read, and whether what they read was still that. Pure.

Life of a lease: announced (its blocks are on their way to host memory) -> exported (they can be read) -> ended, because
its reader is done, because it expired, or because the owner forgets its blocks. While a lease is exported its slots are
pinned by whoever exported it: expiry waits for every READ that was granted, until the reader itself has given it up.

The pin is for the hit; what makes wrong bytes impossible is the fence. Every slot counts how often it was filled. A
grant tells that generation, and the reader asks after its READ whether the lease is open and the generations are the
same. Nothing else counts as an answer, so messages may be lost, doubled, delayed and reordered.

So a reader needs no pin to be safe, only luck: under the standing lease it asks for blocks by their keys, and gets
those that lie in host memory at that moment; and so does the reader of a lease that is only announced, if they are all
there.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import msgspec

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.transport.messages import (
    STANDING_LEASE,
    Ask,
    Check,
    Done,
    Grant,
    Hello,
    Ping,
    Pong,
    Refuse,
    Renew,
    Reply,
    Request,
    Verdict,
    Welcome,
    WindowPlace,
    WordsPlace,
)
from dynamo_connectors.transport.window_desk import Counters, Fill, ReadName, Source, WindowDesk

#: How long a lease lives without a word from its reader.
DEFAULT_LEASE_SECONDS = 30.0
#: A reader counts its deadline from before its question was sent; clocks run apart a little.
_GRACE_SECONDS = 1.0
#: Ended leases that are remembered, so that a late reader hears at once that there is nothing to wait for.
_MOST_REMEMBERED = 4096
#: The engine of a busy owner hands a ticket out before its workers hear of the lease: who asks meanwhile is remembered
#: for so long, and asks again anyway.
_UNKNOWN_SECONDS = 1.0
#: READs of one lease that may be granted at a time.
_MOST_GRANTS = 1024


class Holdings(Protocol):
    """What the slots hold now (`tiers.dram.DramStore`)."""

    def holds(self, slot: int, key: BlockKey) -> bool: ...
    def generation_of(self, slot: int) -> int: ...


class Shelf(Protocol):
    """Where a block lies now (`tiers.dram.DramStore`); a guess, which `Holdings` confirms."""

    def slot_of(self, key: BlockKey) -> int | None: ...


class Offer(NamedTuple):
    """What a reader must know to read, and what it must have in common with the owner."""

    epoch: bytes
    namespace: bytes
    metadata: bytes
    base: int
    rows: int
    row_bytes: int
    window: WindowPlace | None = None
    words: WordsPlace | None = None


class Words(NamedTuple):
    """What readers look at without asking, see `messages.WordsPlace`."""

    run: Counters
    window: Counters


@dataclass
class _Lease:
    expires_at: float
    #: None while it is only announced.
    slots: Mapping[BlockKey, int] | None = None
    #: READ -> when its reader has given it up.
    grants: dict[tuple[bytes, int], float] = field(default_factory=dict)
    #: Readers who want no more of it. When they are all that it was for, it ends with the last READ that was granted.
    left: set[bytes] = field(default_factory=set)
    is_done: bool = False


class Owner:
    """One per worker. Messages in, at most one answer out; `now` is in seconds. `shelf`: serves the standing lease."""

    def __init__(
        self,
        offer: Offer,
        holdings: Holdings,
        lease_seconds: float = DEFAULT_LEASE_SECONDS,
        shelf: Shelf | None = None,
        words: Words | None = None,
    ) -> None:
        self._words = Words([0], [0] * (0 if offer.window is None else offer.window.rows)) if words is None else words
        self._offer = offer
        self._holdings = holdings
        self._lease_seconds = lease_seconds
        self._shelf = shelf
        self._desk = WindowDesk(self._words.window)
        self._leases: dict[bytes, _Lease] = {}
        #: Questions about leases that are not known yet or whose blocks are on their way, and until when they count.
        self._waiting: dict[ReadName, tuple[Ask, float]] = {}
        #: Ended lease -> why.
        self._remembered: OrderedDict[bytes, str] = OrderedDict()
        self._ended: list[bytes] = []
        #: What happened since the last `take_counts`, by (what, label).
        self.counts: Counter[tuple[str, str]] = Counter()

    # -- the engine's side -------------------------------------------------------------------------------------------

    def announce(self, lease: bytes, now: float) -> None:
        """Its blocks will be exported: a reader that asks for them shall wait."""
        if lease not in self._leases and lease not in self._remembered:
            self._leases[lease] = _Lease(now + self._lease_seconds)

    def export(self, lease: bytes, slots: Mapping[BlockKey, int], now: float) -> None:
        """These slots are pinned until `take_ended` names the lease, which it does once, however it ends."""
        if lease in self._remembered:  # its reader is gone already
            self._ended.append(lease)
            return
        known = self._leases.setdefault(lease, _Lease(0.0))
        if known.slots is not None:
            raise AssertionError("a lease is exported twice")
        known.slots, known.expires_at = dict(slots), now + self._lease_seconds

    def revoke(self, lease: bytes) -> None:
        """Its blocks shall not be served any more: a READ of it that is under way ends as stale."""
        self._end(lease, "revoked")

    def why_ended(self, lease: bytes) -> str | None:
        """None while it is open."""
        return None if lease in self._leases else self._remembered.get(lease, "unknown")

    def revoke_all(self) -> None:
        """The blocks shall not be served any more: READs under way end as stale."""
        self._words.run[0] += 1
        for lease in list(self._leases):
            self._end(lease, "revoked")

    def isolate(self, epoch: bytes, namespace: bytes) -> None:
        """Revokes all, and is another owner from now on, for readers with this namespace."""
        self.revoke_all()
        self._offer = self._offer._replace(epoch=epoch, namespace=namespace)

    def take_fills(self) -> list[Fill]:
        """Rows of the window to be filled from host memory; answer each with `filled`."""
        return self._desk.take_fills()

    def filled(self, number: int, is_good: bool = True) -> Grant | None:
        """The copies of a `Fill` are complete, or will never be. Returns what its reader waits for."""

        def holds(source: Source) -> bool:
            return is_good and self._holdings.generation_of(source.slot) == source.generation

        read = self._desk.filled(number, holds)
        return None if read is None else self._from_window(*read)

    def answers(self, now: float) -> list[Grant]:
        """What can be told by now to readers who were told to wait; they need not ask again."""
        ready = [read for read, (ask, until) in self._waiting.items() if until <= now or self._found(ask) is not None]
        asked = [self._waiting.pop(read) for read in ready]
        return [
            self._ask(msgspec.structs.replace(ask, seconds=until - now), now) for ask, until in asked if now < until
        ]

    def expire(self, now: float) -> None:
        self._desk.expire(now)
        for name, lease in list(self._leases.items()):
            lease.grants = {read: until for read, until in lease.grants.items() if until > now}
            if lease.is_done:
                self._end_if_done(name)
            elif lease.expires_at <= now and not lease.grants:
                self._end(name, "expired")

    def take_ended(self) -> list[bytes]:
        ended, self._ended = self._ended, []
        return ended

    @property
    def open_leases(self) -> int:
        return len(self._leases)

    # -- the readers' side -------------------------------------------------------------------------------------------

    def receive(self, message: Request, now: float) -> Reply | None:
        if isinstance(message, Hello):
            return self._hello(message)
        if isinstance(message, Ask):
            return self._ask(message, now)
        if isinstance(message, Check):
            return self._check(message, now)
        if isinstance(message, Done):
            self._done(message, now)
            return None
        if isinstance(message, Ping):
            return Pong(message.reader)
        if isinstance(message, Renew):
            self._renew(message.lease, now)
        elif (lease := self._leases.get(message.lease)) is not None:
            lease.left.add(message.reader)
            lease.is_done = lease.is_done or len(lease.left) >= message.readers
            self._end_if_done(message.lease)
        return None

    def check(self) -> None:
        """Asserts every invariant."""
        assert STANDING_LEASE not in self._leases, "the standing lease was given out"
        assert not self._leases.keys() & self._remembered.keys(), "a lease is open and ended"
        for lease in self._leases.values():
            assert len(lease.grants) <= _MOST_GRANTS, "too many READs of one lease"
        self._desk.check()
        assert len(self._remembered) <= _MOST_REMEMBERED, "too many ended leases are remembered"

    def _hello(self, hello: Hello) -> Reply:
        offer = self._offer
        if hello.namespace != offer.namespace:
            self.counts["nixl_refused_peers", "other_model"] += 1
            detail = (
                "the two engines do not compute the same KV: model, revision, weights, dtype, attention backend, block "
                "size, KV layout and engine version must be equal, and tensor parallelism where heads are not divided "
                "evenly; start both with the same arguments"
            )
            return Refuse(hello.nonce, "other_model", detail)
        if hello.row_bytes != offer.row_bytes:
            self.counts["nixl_refused_peers", "other_block_size"] += 1
            detail = f"a block has {offer.row_bytes} bytes here and {hello.row_bytes} there; use the same --block-size"
            return Refuse(hello.nonce, "other_block_size", detail)
        place = offer.base, offer.rows, offer.row_bytes, offer.window, offer.words
        return Welcome(hello.nonce, offer.namespace, offer.epoch, offer.metadata, *place)

    def _ask(self, ask: Ask, now: float) -> Grant:
        epoch, lease = self._offer.epoch, self._leases.get(ask.lease)
        if ask.epoch != epoch:
            return Grant(ask.reader, ask.read, epoch, "restarted")
        if ask.lease == STANDING_LEASE and self._shelf is not None:
            return self._grant(ask, self._on_shelf(ask) or {}, now)
        if lease is None and ask.lease in self._remembered:
            return Grant(ask.reader, ask.read, epoch, "gone")
        if lease is None:
            self._remember(ask, now + min(ask.seconds, _UNKNOWN_SECONDS))
            return Grant(ask.reader, ask.read, epoch, "unknown")
        is_new = (ask.reader, ask.read) not in lease.grants
        if lease.is_done and is_new:
            return Grant(ask.reader, ask.read, epoch, "gone")
        self._renew(ask.lease, now)
        slots = self._found(ask)
        if slots is None:
            self._remember(ask, now + ask.seconds)
        if slots is None or (len(lease.grants) >= _MOST_GRANTS and is_new):
            return Grant(ask.reader, ask.read, epoch, "pending")
        lease.grants[ask.reader, ask.read] = now + ask.seconds + _GRACE_SECONDS
        return self._grant(ask, slots, now)

    def _remember(self, ask: Ask, until: float) -> None:
        if len(self._waiting) < _MOST_REMEMBERED:
            self._waiting[ask.reader, ask.read] = ask, until

    def _found(self, ask: Ask) -> Mapping[BlockKey, int] | None:
        """None while the lease is still to come, or is announced only and not all of this lies there yet."""
        lease = self._leases.get(ask.lease)
        if lease is None:
            return {} if ask.lease in self._remembered else None
        return self._on_shelf(ask, all_of_it=True) if lease.slots is None else lease.slots

    def _on_shelf(self, ask: Ask, all_of_it: bool = False) -> Mapping[BlockKey, int] | None:
        """Where these blocks lie in host memory, whoever keeps them. None when one is missing of `all_of_it`."""
        found: dict[BlockKey, int] = {}
        # The last first: blocks come in order, and this is asked often.
        for key in map(BlockKey, reversed(ask.keys)):
            slot = None if self._shelf is None else self._shelf.slot_of(key)
            if slot is not None and self._holdings.holds(slot, key):
                found[key] = slot
            elif all_of_it:
                return None
        return found

    def _grant(self, ask: Ask, slots: Mapping[BlockKey, int], now: float) -> Grant:
        places = [self._place(slots, BlockKey(key)) for key in ask.keys]
        if ask.in_window:
            sources = [None if slot < 0 else Source(slot, generation) for slot, generation in places]
            self._desk.ask((ask.reader, ask.read), sources, now + ask.seconds + _GRACE_SECONDS)
            return self._from_window(ask.reader, ask.read)
        return Grant(
            ask.reader,
            ask.read,
            self._offer.epoch,
            "granted",
            tuple(slot for slot, _ in places),
            tuple(generation for _, generation in places),
            int(self._words.run[0]),
        )

    def _from_window(self, reader: bytes, read: int) -> Grant:
        granted = self._desk.granted((reader, read))
        if granted is None:
            return Grant(reader, read, self._offer.epoch, "pending")
        return Grant(reader, read, self._offer.epoch, "granted", *granted, int(self._words.run[0]))

    def _place(self, slots: Mapping[BlockKey, int], key: BlockKey) -> tuple[int, int]:
        slot = slots.get(key, -1)
        if slot < 0:
            return -1, 0
        # In this order: whoever starts to fill the slot in between has a younger generation, which the fence sees.
        generation = self._holdings.generation_of(slot)
        return (slot, generation) if self._holdings.holds(slot, key) else (-1, 0)

    def _check(self, check: Check, now: float) -> Verdict:
        reason = self._why_not(check)
        self._done(check, now)
        if reason:
            self.counts["nixl_fences_refused", reason] += 1
        return Verdict(check.reader, check.read, self._offer.epoch, not reason, reason)

    def _done(self, over: Done | Check, now: float) -> None:
        """Its READ is over: whoever may write to what was granted has waited for that, or has made it known."""
        read = over.reader, over.read
        self._desk.leave(read)
        lease = self._leases.get(over.lease)
        if lease is not None:
            lease.grants.pop(read, None)
            self._renew(over.lease, now)
            self._end_if_done(over.lease)

    def _why_not(self, check: Check) -> str:
        if check.epoch != self._offer.epoch:
            return "restarted"
        if check.lease not in self._leases:
            return "lease_ended"
        if len(check.slots) != len(check.generations) or any(not 0 <= slot < self._offer.rows for slot in check.slots):
            return "garbled"
        now = [self._holdings.generation_of(slot) for slot in check.slots]
        return "" if now == list(check.generations) else "other_generation"

    def _renew(self, name: bytes, now: float) -> None:
        lease = self._leases.get(name)
        if lease is not None:
            lease.expires_at = max(lease.expires_at, now + self._lease_seconds)

    def _end_if_done(self, name: bytes) -> None:
        lease = self._leases[name]
        if lease.is_done and not lease.grants:
            self._end(name, "done")

    def _end(self, name: bytes, reason: str) -> None:
        lease = self._leases.pop(name, None)
        if lease is None:
            return
        self.counts["nixl_leases_ended", reason] += 1
        self._remembered[name] = reason
        if len(self._remembered) > _MOST_REMEMBERED:
            self._remembered.popitem(last=False)
        if lease.slots is not None:
            self._ended.append(name)
