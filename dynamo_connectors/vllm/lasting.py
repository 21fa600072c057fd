"""The tiers of a worker whose content outlives it: what they hold at start, and how they are made to forget.

The disk knows at once; an object store lists its objects in its own time, step by step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.config import NVME_SSD, OBJECT_STORE
from dynamo_connectors.tiers.nvme import NvmeStore
from dynamo_connectors.tiers.object import ObjectStore
from dynamo_connectors.vllm.recovery import Find


class LastingTiers:
    """`object_limit`: how many objects the index has room for; no more are listed.

    `disk_rate`: bytes a second that the disk was read with at start-up, where that was measured.
    """

    def __init__(
        self,
        disk: NvmeStore | None,
        objects: ObjectStore | None,
        object_limit: int = 0,
        disk_rate: float | None = None,
    ) -> None:
        self._disk = disk
        self._objects = objects
        self._tells_disk = disk is not None
        self._rates = {} if disk_rate is None else {NVME_SSD: disk_rate}
        self._listed: list[BlockKey] | None = None
        #: What has been told of the object store's failures.
        self._told: Counter[tuple[str, str]] = Counter()
        if objects is not None:
            self._listed = []
            objects.list_chunks(object_limit)

    def take_finds(self) -> dict[str, Find]:
        """The tiers that have been read to the end since the last call; each is told once."""
        finds: dict[str, Find] = {}
        if self._tells_disk and self._disk is not None:
            self._tells_disk = False
            finds[NVME_SSD] = Find(1, self._disk.recovered)
            self._disk.recovered = ()
        if self._listed is not None and self._objects is not None:
            chunks, are_last = self._objects.take_listed()
            self._listed += chunks
            if are_last:
                # Objects go by name: the index gives them numbers of its own.
                finds[OBJECT_STORE] = Find(1, [(0, chunk) for chunk in self._listed])
                self._listed = None
        return finds

    def take_rates(self) -> dict[str, float]:
        """Tier -> bytes a second measured at start-up; told once."""
        rates, self._rates = self._rates, {}
        return rates

    def take_failures(self) -> Mapping[tuple[str, str], int]:
        """What the object store came to since the last call, by (what, label) as the metrics count it."""
        if self._objects is None:
            return {}
        stats = self._objects.stats()
        so_far = Counter({("object_failures", reason): times for reason, times in stats.failures.items()})
        so_far["object_circuits", ""] = stats.circuits_opened
        new, self._told = so_far - self._told, so_far
        return new

    def forget(self) -> None:
        """Nothing they hold is served again, and nothing they get from now on outlives this process."""
        for store in (self._disk, self._objects):
            if store is not None:
                store.forget()
