"""One pod of a rolling restart: drained, deleted, and its successor ready before the next one goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .drained_stop import DrainedStop
from .errors import ActuationError
from .kube_client import KubeClient
from .kube_target import KubeSettings, Pod
from .replica import Surroundings


class Pods(Protocol):
    """What the actuator knows of its pods, and how it marks them."""

    replacing: tuple[str, ...]

    def pods_named(self, urls: Sequence[str]) -> list[Pod]: ...
    def ready_pods(self) -> int: ...
    async def mark(self, urls: Sequence[str]) -> None: ...
    async def unmark(self, urls: Sequence[str]) -> None: ...
    async def left(self, urls: Sequence[str]) -> tuple[frozenset[str], bool]: ...


class PodReplacement:
    """Stops a pod by deleting it, so that its controller makes another one."""

    def __init__(self, pods: Pods, client: KubeClient, around: Surroundings, settings: KubeSettings) -> None:
        self._pods = pods
        self._client = client
        self._around = around
        self._settings = settings

    async def replace_one(self, url: str) -> str:
        """Returns why it could not be, or nothing."""
        before, found = self._pods.ready_pods(), self._pods.pods_named([url])
        if not found:
            return ""  # it has gone by itself
        self._pods.replacing = (url,)
        try:
            told = await DrainedStop((url,), self, self._around).run()
        finally:
            self._pods.replacing = ()
        failed = [event.reason or event.what for event in told if event.what != "stopped"]
        if failed:
            return failed[0]
        # The planner's own ticks refresh what is known of the pods.
        end = self._around.clock() + self._around.limits.start_seconds
        while self._pods.pods_named([url]) or self._pods.ready_pods() < before:
            if self._around.clock() >= end:
                return "start_timeout"
            await self._around.sleep(self._around.limits.poll_seconds)
        return ""

    async def mark(self, urls: Sequence[str]) -> None:
        await self._pods.mark(urls)

    async def unmark(self, urls: Sequence[str]) -> None:
        await self._pods.unmark(urls)

    async def stop(self, urls: Sequence[str]) -> None:
        for pod in self._pods.pods_named(urls):
            await self._client.delete_pod(self._settings.target.namespace, pod.name)

    async def left(self, urls: Sequence[str]) -> tuple[frozenset[str], bool]:
        try:
            return (await self._pods.left(urls))[0], False
        except ActuationError:
            return frozenset(urls), False
