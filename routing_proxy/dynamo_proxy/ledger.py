"""What is in flight on each engine: charged when a request is placed, released in exactly one place."""

from __future__ import annotations

from dataclasses import dataclass

from .policy import Load


@dataclass(slots=True, eq=False)
class Lease:
    """One request's charge on one engine. Only the ledger changes it."""

    slot: int
    pending_tokens: int
    active_tokens: int
    held: bool = True


class Ledger:
    """Load per engine slot, and the leases it is made of."""

    def __init__(self) -> None:
        self.loads: dict[int, Load] = {}  # read it, do not change it; `load` makes the records
        self._leases: set[Lease] = set()

    def load(self, slot: int) -> Load:
        """The live load record of a slot (read it, do not change it)."""
        load = self.loads.get(slot)
        if load is None:
            load = self.loads[slot] = Load(slot)
        return load

    @property
    def in_flight(self) -> int:
        return len(self._leases)

    def charge(self, slot: int, pending_tokens: int, active_tokens: int) -> Lease:
        load = self.loads.get(slot) or self.load(slot)
        load.in_flight += 1
        load.pending_tokens += pending_tokens
        load.active_tokens += active_tokens
        lease = Lease(slot, pending_tokens, active_tokens)
        self._leases.add(lease)
        return lease

    def prefilled(self, lease: Lease) -> None:
        """The first response byte came: its prefill no longer waits. Harmless when repeated."""
        if lease.held and lease.pending_tokens:
            self.loads[lease.slot].pending_tokens -= lease.pending_tokens
            lease.pending_tokens = 0

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
            held = [lease for lease in self._leases if lease.slot == slot]
            assert load.in_flight == len(held), f"slot {slot}: {load.in_flight} in flight, {len(held)} leases"
            pending = sum(lease.pending_tokens for lease in held)
            assert load.pending_tokens == pending, f"slot {slot}: pending {load.pending_tokens} != {pending}"
            active = sum(lease.active_tokens for lease in held)
            assert load.active_tokens == active, f"slot {slot}: active {load.active_tokens} != {active}"
        assert all(lease.held for lease in self._leases), "a released lease is still listed"
        assert all(lease.slot in self.loads for lease in self._leases), "a lease without a load"
