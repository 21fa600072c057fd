"""Copies inside one GPU's memory: pages to packed rows, and back. One launch a band, on the current stream."""

from __future__ import annotations

import threading

from dynamo_kernels.block_view import BlockView
from dynamo_kernels.geometry import Addresses, bands
from dynamo_kernels.machine import Kernel, KernelCopy, Machine
from dynamo_kernels.plan import Decision


class InsidePlan:
    """Keep it while copies are running. Many threads may call at once."""

    decisions: tuple[Decision, ...] = ()

    def __init__(self, src: BlockView, dst: BlockView, machine: Machine) -> None:
        self._machine = machine
        self._bands = [(band, machine.tables(band)) for band in bands(src, dst)]
        self._lock = threading.Lock()

    def enqueue(self, sources: Addresses, targets: Addresses) -> None:
        """Of ids that have been through `checked_ids` for these blocks."""
        with self._lock:
            stream = self._machine.current()
            ids = self._machine.upload(sources, targets, stream)
            for band, tables in self._bands:
                self._machine.launch(KernelCopy(Kernel.DIRECT, band, tables, ids, 0), stream)


def lies_inside(src: BlockView, dst: BlockView) -> bool:
    """Whether all of it lies in one GPU's memory, where kernels reach it."""
    one_gpu = src.device.type == "cuda" and src.device == dst.device
    return one_gpu and all(band.for_kernels for band in bands(src, dst))
