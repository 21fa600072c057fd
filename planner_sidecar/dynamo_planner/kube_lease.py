"""A Lease that only one planner holds at a time: whoever holds it may write.

Time is the local clock only: a foreign lease counts as expired when it has not changed for its whole duration under our
eyes, as the wall clocks of two machines may differ. A write race is decided by the resourceVersion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import KubeError
from .kube_client import KubeClient


class WriterLease:
    """One attempt per tick to take or renew it; `holds` asks without I/O."""

    def __init__(self, client: KubeClient, namespace: str, name: str, identity: str, duration_seconds: float) -> None:
        self._client = client
        self._namespace = namespace
        self._name = name
        self.identity = identity
        self._duration = duration_seconds
        self._held_until: float | None = None
        self._seen: tuple[str, float] | None = None
        self.holder = ""

    def holds(self, now: float) -> bool:
        """Whether writing is allowed now, with a third of the time to spare."""
        return self._held_until is not None and now < self._held_until - self._duration / 3

    async def keep(self, clock: Callable[[], float], stamp: str) -> bool:
        """Take or renew. Returns whether it is held. Raises KubeError if the API cannot be asked."""
        before = clock()
        lease = await self._client.get_lease(self._namespace, self._name)
        try:
            if lease is None:
                await self._client.create_lease(self._namespace, self._written({}, stamp, anew=True))
            elif self._is_free(lease, before):
                mine = lease.get("spec", {}).get("holderIdentity") == self.identity
                body = self._written(lease, stamp, anew=not mine)
                await self._client.put_lease(self._namespace, self._name, body)
            else:
                self._held_until = None
                return False
        except KubeError as error:
            if error.reason != "conflict":
                raise
            self._held_until = None  # another one was quicker
            return False
        # From before the question: the time on the way is not ours.
        self.holder, self._held_until = self.identity, before + self._duration
        return True

    async def give_up(self, stamp: str) -> None:
        """Let the next one in at once. Failing is harmless: the lease then runs out."""
        if self._held_until is None:
            return
        self._held_until = None
        try:
            lease = await self._client.get_lease(self._namespace, self._name)
            if lease is not None and lease.get("spec", {}).get("holderIdentity") == self.identity:
                lease["spec"] |= {"holderIdentity": "", "renewTime": stamp}
                await self._client.put_lease(self._namespace, self._name, lease)
        except KubeError:
            return

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        assert self._held_until is None or self.holder == self.identity, "held, but by somebody else"

    def _is_free(self, lease: dict[str, Any], now: float) -> bool:
        spec, version = lease.get("spec", {}), str(lease["metadata"].get("resourceVersion"))
        self.holder = str(spec.get("holderIdentity") or "")
        if self.holder in ("", self.identity):
            return True
        if self._seen is None or self._seen[0] != version:
            self._seen = version, now
        return now - self._seen[1] > float(spec.get("leaseDurationSeconds") or self._duration)

    def _written(self, lease: dict[str, Any], stamp: str, anew: bool) -> dict[str, Any]:
        spec = dict(lease.get("spec", {}))
        if anew:
            spec |= {"acquireTime": stamp, "leaseTransitions": int(spec.get("leaseTransitions") or 0) + 1}
        spec |= {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": max(1, round(self._duration)),
            "renewTime": stamp,
        }
        meta = lease.get("metadata", {"name": self._name, "namespace": self._namespace})
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": spec}
