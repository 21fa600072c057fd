"""Loads that arrive layer by layer, without a GPU: each group of layers is copied when something waits for it.

That is as late as a GPU may be. Who waits for nothing, or for too little, reads what was there before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from dynamo_kernels import ComputeFence, layered
from dynamo_kernels.layered import group_of

from dynamo_connectors.transfer import TransferEngine
from dynamo_connectors.vllm import setup
from tests.vllm.simulated_engine import LAYERS, SimulatedEngine, SimulatedWorker, ours

#: When a copy that nobody waits for is there all the same. Nothing is right or wrong by it.
AT_LAST_SECONDS = 0.2


class LateLoad:
    """Stands for the load's last fence too."""

    def __init__(self, copies: Sequence[Callable[[], None]]) -> None:
        self.copies = copies
        self.blocks = {int(block) for block in copies[0].args[-1]}  # type: ignore[attr-defined]
        self.here = 0
        self._lock = threading.Lock()
        self._is_done = threading.Event()

    def arrive(self, groups: int) -> None:
        with self._lock:
            for copy in self.copies[self.here : groups]:
                copy()
            self.here = max(self.here, groups)
            if self.here == len(self.copies):
                self._is_done.set()

    def wait(self) -> None:
        """On the thread that reports the load."""
        if not self._is_done.wait(AT_LAST_SECONDS):
            self.arrive(len(self.copies))

    def is_done(self) -> bool:
        return self._is_done.is_set()


class LateStream:
    """In the place of `LayerStream`."""

    def __init__(self, parts: int) -> None:
        self._parts = parts
        self._open: list[LateLoad] = []
        self._all: list[LateLoad] = []
        #: Loads so far; groups that came because a layer waited, and because everything was joined.
        self.counts = {"loads": 0, "waits": 0, "joins": 0}

    def start(self, fence: Any, copies: Sequence[Callable[[], None]]) -> LateLoad:
        load = LateLoad(copies)
        self._open.append(load)
        self._all = [*(other for other in self._all if not other.is_done()), load]
        self.counts["loads"] += 1
        return load

    @property
    def is_open(self) -> bool:
        return bool(self._open)

    def wait(self, part: int) -> None:
        for load in self._open:
            self._arrive(load, group_of(part, self._parts, len(load.copies)) + 1, "waits")

    def join(self) -> None:
        for load in self._open:
            self._arrive(load, len(load.copies), "joins")
        self._open.clear()

    def fence(self) -> Any:
        return self._all[-1] if self._all else ComputeFence(torch.device("cpu"))

    def assert_free(self, block: int, layer: str) -> None:
        """Nothing writes what a copy will still overwrite."""
        for load in self._all:
            group = group_of(LAYERS.index(layer), self._parts, len(load.copies))
            assert block not in load.blocks or load.here > group, f"block {block} is written before its load is there"

    def arrive(self) -> None:
        """All copies end now."""
        for load in self._all:
            load.arrive(len(load.copies))

    def _arrive(self, load: LateLoad, groups: int, why: str) -> None:
        self.counts[why] += max(0, groups - load.here)
        load.arrive(groups)


@contextmanager
def late_layers() -> Iterator[None]:
    """Around the making of an engine: its loads come so."""

    def all_layers(vllm_config: Any, pages: Any) -> Mapping[str, int]:
        return dict(pages.part_of_layer)

    prepare = TransferEngine.prepare_layers

    def prepare_late(self: TransferEngine) -> None:
        prepare(self)
        self.layers = LateStream(len(LAYERS))  # type: ignore[assignment]

    with (
        patch.object(setup, "layers_that_ask", all_layers),
        patch.object(TransferEngine, "prepare_layers", prepare_late),
        patch.multiple(layered, _GROUP_BYTES=1, _GROUP_PARTS=1),
    ):
        yield


def stream_of(worker: SimulatedWorker) -> LateStream:
    stream = ours(worker.connector)._worker._transfers.layers
    assert isinstance(stream, LateStream)
    return stream


def watch_writes(engine: SimulatedEngine) -> None:
    for worker in engine.workers:
        worker.before_write = stream_of(worker).assert_free
