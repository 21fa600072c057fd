"""What is in flight on each engine: charged when a request is placed, released in exactly one place."""

from __future__ import annotations

from typing import NamedTuple, final

from .policy import Load


@final
class Lease:
    """One request's charge on one engine. Only the ledger changes it."""

    __slots__ = ("active_tokens", "held", "pending_tokens", "prefill_mark", "slot")

    def __init__(self, slot: int, pending_tokens: int, active_tokens: int) -> None:
        self.slot = slot
        self.pending_tokens = pending_tokens
        self.active_tokens = active_tokens
        self.held = True
        self.prefill_mark = 0.0  # its engine's prefill seconds so far, when its own prefill was over


class Counts(NamedTuple):
    """A part of an engine's load."""

    in_flight: int = 0
    pending_tokens: int = 0
    active_tokens: int = 0


_NONE = Counts()


class Ledger:
    """Load per engine slot, and the leases it is made of."""

    def __init__(self) -> None:
        # What lies on each engine: our leases and what other proxies told. Read it, do not change it; `load` makes the
        # records.
        self.loads: dict[int, Load] = {}
        self._leases: set[Lease] = set()
        self._prefill_seconds: dict[int, float] = {}  # so far, by slot
        self._told: dict[str, dict[int, Counts]] = {}  # by other proxy, by slot

    def load(self, slot: int) -> Load:
        """The live load record of a slot (read it, do not change it)."""
        load = self.loads.get(slot)
        if load is None:
            load = self.loads[slot] = Load(slot)
        return load

    @property
    def in_flight(self) -> int:
        return len(self._leases)

    def own(self, slot: int) -> Counts:
        """What our own requests make of an engine's load."""
        load = self.load(slot)
        in_flight, pending, active = load.in_flight, load.pending_tokens, load.active_tokens
        for slots in self._told.values():
            other = slots.get(slot, _NONE)
            in_flight -= other.in_flight
            pending -= other.pending_tokens
            active -= other.active_tokens
        return Counts(in_flight, pending, active)

    def told(self, proxy: str, slot: int, counts: Counts) -> None:
        """Another proxy says what its requests make of an engine's load."""
        slots = self._told.setdefault(proxy, {})
        before = slots.get(slot, _NONE)
        load = self.load(slot)
        load.in_flight += counts.in_flight - before.in_flight
        load.pending_tokens += counts.pending_tokens - before.pending_tokens
        load.active_tokens += counts.active_tokens - before.active_tokens
        if any(counts):
            slots[slot] = counts
        else:
            slots.pop(slot, None)

    @property
    def proxies(self) -> tuple[str, ...]:
        """The other proxies that told of their loads."""
        return tuple(self._told)

    def forget_proxy(self, proxy: str) -> None:
        """Another proxy is gone, and its connections with it."""
        for slot in list(self._told.get(proxy, ())):
            self.told(proxy, slot, _NONE)
        self._told.pop(proxy, None)

    def forget_slot(self, slot: int) -> None:
        """An engine left: what others told of it means nothing for the next one of this number."""
        for proxy in list(self._told):
            self.told(proxy, slot, _NONE)

    def charge(self, slot: int, pending_tokens: int, active_tokens: int) -> Lease:
        load = self.loads.get(slot) or self.load(slot)
        load.in_flight += 1
        load.pending_tokens += pending_tokens
        load.active_tokens += active_tokens
        lease = Lease(slot, pending_tokens, active_tokens)
        self._leases.add(lease)
        return lease

    def expect_prefill(self, lease: Lease, tokens: int) -> None:
        """So many tokens of the request wait for prefill on its engine: none while another engine computes them."""
        if lease.held:
            self.loads[lease.slot].pending_tokens += tokens - lease.pending_tokens
            lease.pending_tokens = tokens

    def prefilled(self, lease: Lease, seconds: float = 0.0) -> None:
        """The first response byte came: its prefill, of so many seconds, no longer waits. Harmless when repeated."""
        if lease.held and lease.pending_tokens:
            self.loads[lease.slot].pending_tokens -= lease.pending_tokens
            done = self._prefill_seconds.get(lease.slot, 0.0) + seconds
            self._prefill_seconds[lease.slot] = lease.prefill_mark = done
            lease.pending_tokens = 0

    def seconds_beside(self, lease: Lease) -> float:
        """How long its engine prefilled other requests since this one's prefill was over. What other proxies sent there
        is taken to be as much as their share of its load.
        """
        if not lease.prefill_mark:
            return 0.0
        seconds = self._prefill_seconds.get(lease.slot, 0.0) - lease.prefill_mark
        if self._told:
            seconds *= self.loads[lease.slot].in_flight / max(1, self.own(lease.slot).in_flight)
        return seconds

    def release(self, lease: Lease) -> None:
        """The request left the engine, however it ended. Harmless when repeated."""
        if not lease.held:
            return
        self.prefilled(lease)
        load = self.loads[lease.slot]
        load.in_flight -= 1
        load.active_tokens -= lease.active_tokens
        lease.held = False
        self._leases.remove(lease)

    def check(self) -> None:
        for slot, load in self.loads.items():
            assert load.slot == slot, f"the load of slot {load.slot} is filed under {slot}"
            held = [lease for lease in self._leases if lease.slot == slot]
            pending = sum(lease.pending_tokens for lease in held)
            active = sum(lease.active_tokens for lease in held)
            own, leased = self.own(slot), (len(held), pending, active)
            assert own == leased, f"slot {slot}: {own} counted, {leased} leased"
        assert all(lease.held for lease in self._leases), "a released lease is still listed"
        assert all(lease.slot in self.loads for lease in self._leases), "a lease without a load"
