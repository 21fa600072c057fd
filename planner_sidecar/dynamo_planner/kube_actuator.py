"""Scales an object of a Kubernetes cluster through its scale subresource; its pods are the replicas.

Counting. Ready pods are supply, young pods that are not ready yet are supply on its way, pods that stay unready for
`pending_seconds` are not supply any more. What was ordered (`spec.replicas`) is remembered apart: a count that somebody
else writes is adopted, and nothing is ordered twice because it has not come yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .actuator import Happening, Outcome, Supplement
from .errors import ActuationError, KubeError, ObservationError
from .kube_client import KubeClient
from .kube_lease import WriterLease
from .kube_replacement import PodReplacement
from .kube_target import KubeSettings, Pod, choose_pods, pod_of
from .records import DOWN, DRAINING, READY, STARTING
from .replica import Surroundings
from .rolling import RollingRestart
from .stop_in_hand import StopInHand
from .wall_clock import WallClock

_CONFLICTS = 3


class KubernetesActuator:
    """One scale target. `refresh` looks, `apply` writes; only the holder of the lease writes."""

    mode = "actuate"

    def __init__(
        self, settings: KubeSettings, client: KubeClient, lease: WriterLease, around: Surroundings, wall: WallClock
    ) -> None:
        self._settings = settings
        self._client = client
        self._lease = lease
        self._around = around
        self._wall = wall
        self._pods: dict[str, Pod] = {}
        self._unready_since: dict[str, float] = {}
        self._ready_once: set[str] = set()
        self._ordered: int | None = None
        self._is_known = False
        self._registered: set[str] = set()
        self._stop = StopInHand(self, around)
        self._goal = 0
        self._rolling = RollingRestart()
        self.replacing: tuple[str, ...] = ()

    def states(self) -> Mapping[str, str]:
        leaving = self._leaving()
        return {pod.url: DRAINING if pod.url in leaving else self._state(pod) for pod in self._pods.values()}

    async def refresh(self) -> Supplement:
        """Renew the lease, read the scale and the pods, put the proxy's list right. Raises ObservationError."""
        self._stop.book()
        try:
            held = await self._lease.keep(self._around.clock, self._wall.stamp())
            scale = await self._client.get_scale(self._settings.target)
            plain = await self._client.list_pods(self._settings.target.namespace, self._selector(scale))
        except KubeError as error:
            self._is_known = False
            raise ObservationError(error.reason, str(error)) from error
        ordered = int(scale.get("spec", {}).get("replicas") or 0)
        is_edited = self._ordered is not None and ordered != self._ordered
        if is_edited:
            text = f"somebody else ordered {ordered} instead of {self._ordered}; adopted"
            self._stop.note(Happening(str(self._settings.target), "adopted", "", text))
        self._ordered, self._is_known = ordered, True
        startups = self._take_pods(plain)
        if held:
            await self._mend()
        return Supplement(startups=startups, is_edited=is_edited, ordered=ordered)

    async def apply(self, current: int, desired: int, by_hand: bool) -> Outcome:
        """Order more at once; drain first, then order fewer."""
        if not self._is_known or self._ordered is None:
            return Outcome(False, "api_unreachable", ("the cluster cannot be read; nothing is changed",))
        if not self._lease.holds(self._around.clock()):
            return Outcome(False, "not_the_writer", (f"{self._lease.holder or 'nobody'} holds the lease",))
        if self._rolling.is_running:
            return Outcome(False, "restarting", ("a rolling restart is under way; order again when it has ended",))
        return await self._stop.attempt(self._more(desired) if desired > current else self._fewer(desired))

    async def restart(self) -> Outcome:
        """Each pod is drained and deleted; its controller makes a new one, which must be ready before the next goes."""
        if not self._is_known or not self._lease.holds(self._around.clock()):
            return Outcome(False, "not_the_writer", ("the cluster cannot be read, or another planner holds the lease",))
        if self._rolling.is_running or self._stop.is_running:
            return Outcome(False, "restarting", ("a drain or a restart is under way already",))
        pods = [pod for pod in self._pods.values() if pod.is_ready and not pod.is_leaving]
        if len(pods) < 2:
            text = "the only replica cannot be restarted without a gap; order two first"
            return Outcome(False, "too_few", (text,))
        replacement = PodReplacement(self, self._client, self._around, self._settings)
        self._rolling.begin([pod.url for pod in pods], replacement.replace_one)
        return Outcome(True, "restarting", (f"replacing {len(pods)} pods, one at a time",))

    def happenings(self) -> list[Happening]:
        return self._stop.take() + self._rolling.take()

    async def close(self) -> None:
        """Pods stay: they are the cluster's. A drain that has not come to its order is taken back."""
        await self._rolling.end()
        await self._stop.close()
        await self._lease.give_up(self._wall.stamp())

    def kill_now(self) -> None:
        self._rolling.cancel()
        self._stop.cancel()

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken."""
        self._lease.check()
        self._stop.check()
        assert all(pod.name == name for name, pod in self._pods.items()), "a pod is booked under another name"

    # -- what DrainedStop asks of the cluster ------------------------------------------------------------------
    async def mark(self, urls: Sequence[str]) -> None:
        for pod in self.pods_named(urls):
            await self._client.mark_pod(self._settings.target.namespace, pod.name, self._wall.stamp())

    async def unmark(self, urls: Sequence[str]) -> None:
        for pod in self.pods_named(urls):
            try:
                await self._client.mark_pod(self._settings.target.namespace, pod.name, None)
            except KubeError as error:
                if error.reason != "not_found":
                    raise

    async def stop(self, urls: Sequence[str]) -> None:
        await self._write(self._goal, may_only="shrink")

    async def left(self, urls: Sequence[str]) -> tuple[frozenset[str], bool]:
        scale = await self._client.get_scale(self._settings.target)
        plain = await self._client.list_pods(self._settings.target.namespace, self._selector(scale))
        pods = [pod for pod in map(self._pod, plain) if pod is not None]
        living = frozenset(pod.url for pod in pods if not pod.is_leaving and pod.url in urls)
        ordered = int(scale.get("spec", {}).get("replicas") or 0)
        return living, sum(not pod.is_leaving for pod in pods) <= ordered

    # -- up and down ---------------------------------------------------------------------------------------------
    async def _more(self, desired: int) -> Outcome:
        kept = self._stop.take_back()
        if kept is not None:
            return kept
        before = self._ordered or 0
        if desired <= before:
            return Outcome(True, "ordered_already", (f"{before} are ordered and have not all come yet",))
        await self._write(desired, may_only="grow")
        return Outcome(True, "scaled", (f"{self._settings.target}: {before} -> {desired}",))

    async def _fewer(self, desired: int) -> Outcome:
        if self._stop.is_running:
            return Outcome(False, "draining", ("an earlier drain is still under way",))
        living = [pod for pod in self._pods.values() if not pod.is_leaving]
        count = min((self._ordered or 0), len(living)) - desired
        if count <= 0:  # what was ordered never came: take the order back
            await self._write(desired, may_only="shrink")
            return Outcome(True, "scaled", (f"{self._settings.target}: order taken back to {desired}",))
        in_flight = await self._in_flight()
        victims = choose_pods(living, count, in_flight, self._settings.target.is_ordered)
        self._goal = desired
        serving = tuple(pod.url for pod in victims if pod.is_ready)
        self._stop.begin(serving)
        names = ", ".join(pod.name for pod in victims)
        return Outcome(True, "draining", (f"draining {names}, then {self._settings.target} -> {desired}",))

    async def _write(self, replicas: int, may_only: str) -> None:
        """Set the count unless somebody else has set another one. Raises ActuationError."""
        for _ in range(_CONFLICTS):
            if not self._lease.holds(self._around.clock()):
                raise ActuationError("not_the_writer", "the lease was lost; the new holder decides")
            scale = await self._client.get_scale(self._settings.target)
            found = int(scale.get("spec", {}).get("replicas") or 0)
            if found != self._ordered:
                raise ActuationError("edited", f"{self._settings.target} was changed to {found} by somebody else")
            if (replicas >= found) if may_only == "shrink" else (replicas <= found):
                return
            scale.setdefault("spec", {})["replicas"] = replicas
            try:
                await self._client.put_scale(self._settings.target, scale)
            except KubeError as error:
                if error.reason == "conflict":  # its status moved; look again whether the count did
                    continue
                raise
            self._ordered = replicas
            return
        raise ActuationError("conflict", f"{self._settings.target} changes faster than it can be written")

    # -- pods ----------------------------------------------------------------------------------------------------
    def _pod(self, plain: Mapping[str, Any]) -> Pod | None:
        return pod_of(plain, self._settings.pod_port, self._settings.target.is_ordered)

    def _take_pods(self, plain: list[dict[str, Any]]) -> tuple[float, ...]:
        """Book the pods and return how long those took that have just become ready."""
        pods = {pod.name: pod for pod in map(self._pod, plain) if pod is not None}
        now, wall = self._around.clock(), self._wall.seconds()
        startups = []
        for name, pod in pods.items():
            if pod.is_ready:
                if name not in self._ready_once and self._unready_since.get(name) is not None:
                    startups.append(max(0.0, wall - pod.created_seconds))
                    text = f"ready {startups[-1]:.0f} s after it was created"
                    self._stop.note(Happening(pod.url, "ready", "", text))
                self._ready_once.add(name)
                self._unready_since.pop(name, None)
            elif name not in self._unready_since:
                age = 0.0 if name in self._ready_once else max(0.0, wall - pod.created_seconds)
                self._unready_since[name] = now - age
        self._unready_since = {name: since for name, since in self._unready_since.items() if name in pods}
        self._ready_once &= pods.keys()
        self._pods = pods
        return tuple(startups)

    def _state(self, pod: Pod) -> str:
        if pod.is_leaving:
            return DRAINING
        if pod.is_ready:
            return READY
        since = self._unready_since.get(pod.name)
        late = since is not None and self._around.clock() - since >= self._settings.pending_seconds
        return DOWN if late else STARTING

    def _leaving(self) -> set[str]:
        return {*self._stop.urls, *self.replacing}

    def ready_pods(self) -> int:
        """As of the last look."""
        return sum(pod.is_ready and not pod.is_leaving for pod in self._pods.values())

    def pods_named(self, urls: Sequence[str]) -> list[Pod]:
        return [pod for pod in self._pods.values() if pod.url in urls]

    def _selector(self, scale: Mapping[str, Any]) -> str:
        said = scale.get("status", {}).get("selector") or self._settings.target.own_selector
        if not said:
            text = (
                f"{self._settings.target} does not say which pods are its own (status.selector of its scale is empty)"
            )
            raise KubeError("no_selector", text)
        return str(said)

    # -- the proxy's list ------------------------------------------------------------------------------------------
    async def _mend(self) -> None:
        """Register ready pods, forget gone ones, and free those that a planner before us had marked and left."""
        leaving = self._leaving()
        serving = {pod.url for pod in self._pods.values() if pod.is_ready and not pod.is_leaving} - leaving
        left_marked = [pod.url for pod in self.pods_named(sorted(serving)) if pod.is_marked]
        proxy = self._around.proxy
        try:
            if proxy is not None:
                listing = await proxy.engines()
                for url in left_marked:
                    await proxy.resume(url)
                for url in sorted(serving - {engine.url for engine in listing.engines}):
                    if 200 <= await proxy.register(url) < 300:
                        self._registered.add(url)
                known = {pod.url for pod in self._pods.values()}
                for url in sorted(self._registered - known):
                    await proxy.remove(url)
                    self._registered.discard(url)
            await self.unmark(left_marked)
        except (ObservationError, ActuationError) as error:
            self._stop.note(Happening("", "failed", error.reason, str(error)))

    async def _in_flight(self) -> dict[str, int]:
        if self._around.proxy is None:
            return {}
        try:
            return {engine.url: engine.in_flight for engine in (await self._around.proxy.engines()).engines}
        except ObservationError:
            return {}
