"""A prepared copy between two views: everything that does not change from call to call is worked out once.

`enqueue` orders itself between what the current stream has been given and what it will be given, and returns at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamo_kernels import dma
from dynamo_kernels.block_view import BlockView
from dynamo_kernels.choices import ENGINES_ALONE_BYTES, Case, Choice, Direction, Path
from dynamo_kernels.geometry import Addresses, Band, Side, bands
from dynamo_kernels.ids import checked_ids
from dynamo_kernels.machine import Kernel, KernelCopy, Machine

Chooser = Callable[[Case], Choice]

#: Two buffers of this size: the engines fill one while the kernels empty the other. Smaller ones cross PCIe faster than
#: the host can launch (H200, 2026-11-22: 4 MiB 24 GB/s, 16 MiB 52 GB/s).
_STAGING_BYTES = 16 << 20
_BUFFERS = 2


@dataclass(frozen=True)
class Decision:
    """What was chosen for the last copy of a band; the connector's metrics print it."""

    case: Case
    choice: Choice


class CopyPlan:
    """Copies blocks from one view to another of equal parts. One caller at a time; keep it while copies are running."""

    def __init__(
        self, src: BlockView, dst: BlockView, direction: Direction, machine: Machine, chooser: Chooser
    ) -> None:
        self._machine, self._chooser = machine, chooser
        self._blocks = src.num_blocks, dst.num_blocks
        self._bands = [_Prepared(band, machine, direction) for band in bands(src, dst)]
        self._lock = threading.Lock()
        self.decisions: tuple[Decision, ...] = ()

    def cases(self, blocks: int) -> tuple[Case, ...]:
        """What copying so many blocks is to the chooser, band by band."""
        return tuple(band.case(blocks) for band in self._bands)

    def enqueue(self, src_ids: Sequence[int] | NDArray[Any], dst_ids: Sequence[int] | NDArray[Any]) -> None:
        """Starts the copy of block `src_ids[i]` over block `dst_ids[i]`.

        Raises `CopyError` before anything is copied when an id is out of range or a destination is named twice.
        """
        self.enqueue_checked(*checked_ids(self._blocks[0], src_ids, self._blocks[1], dst_ids))

    def enqueue_checked(self, sources: Addresses, targets: Addresses) -> None:
        """As `enqueue`, of ids that have been through `checked_ids` for these blocks."""
        if not len(sources):
            return
        machine = self._machine
        with self._lock:
            current = machine.current()
            begun = current.record_event()
            for stream in (machine.dma, machine.kernels):
                stream.wait_event(begun)
            decisions = []
            for band in self._bands:
                case = band.case(len(sources))
                choice = self._chooser(case)
                band.copy(choice, sources, targets)
                decisions.append(Decision(case, choice))
            for stream in (machine.dma, machine.kernels):
                current.wait_event(stream.record_event())
            self.decisions = tuple(decisions)


class _Prepared:
    """One band with its tables, and the paths over it."""

    def __init__(self, band: Band, machine: Machine, direction: Direction) -> None:
        self._band, self._machine, self._direction = band, machine, direction
        self._tables = machine.tables(band) if band.for_kernels else None
        host = band.src if direction is Direction.H2D else band.dst
        self._rows_touch = band.parts > 1 and host.spacing == band.part_bytes
        self._for_tma = machine.has_tma and band.for_tma
        self._staging: _Staging | None = None

    def case(self, blocks: int) -> Case:
        band = self._band
        return Case(
            self._direction,
            band.part_bytes,
            blocks * band.parts,
            for_kernels=band.for_kernels,
            has_lines=band.pitches is not None,
            has_rows=self._rows_touch,
            for_tma=self._for_tma,
        )

    def copy(self, choice: Choice, src_ids: Addresses, dst_ids: Addresses) -> None:
        if choice.path is Path.DMA:
            self._by_engines(src_ids, dst_ids)
        elif choice.path is Path.ZERO_COPY:
            self._by_kernel(choice.ctas, src_ids, dst_ids)
        elif choice.path is Path.TMA:
            self._by_kernel(choice.ctas, src_ids, dst_ids, Kernel.TMA)
        elif choice.path is Path.SPLIT:
            share = round(len(src_ids) * choice.dma_share)
            # The kernel first: it runs while the host is still handing the engines their work.
            if share < len(src_ids):
                self._by_kernel(choice.ctas, src_ids[share:], dst_ids[share:])
            self._by_engines(src_ids[:share], dst_ids[:share])
        else:
            self._staging = self._staging or _Staging(self._band, self._machine, self._direction)
            self._staging.copy(src_ids, dst_ids)

    def _by_engines(self, src_ids: Addresses, dst_ids: Addresses) -> None:
        band, machine = self._band, self._machine
        if not len(src_ids):
            return
        if band.pitches is not None and band.part_bytes < ENGINES_ALONE_BYTES:
            machine.copy_lines(dma.line_copies(band, src_ids, dst_ids), machine.dma)
        else:
            machine.copy_fragments(dma.fragments(band, src_ids, dst_ids), machine.dma)

    def _by_kernel(self, ctas: int, src_ids: Addresses, dst_ids: Addresses, kernel: Kernel = Kernel.PIPELINED) -> None:
        machine = self._machine
        ids = machine.upload(src_ids, dst_ids, machine.kernels)
        machine.launch(KernelCopy(kernel, self._band, self._tables, ids, ctas), machine.kernels)


class _Staging:
    """Rows cross PCIe whole, by the engines; a kernel gathers them in HBM before, or scatters them there after."""

    def __init__(self, band: Band, machine: Machine, direction: Direction) -> None:
        self._machine, self._loads = machine, direction is Direction.H2D
        self._per_buffer = max(1, _STAGING_BYTES // band.block_bytes)
        size = self._per_buffer * band.block_bytes
        address, self._memory = machine.staging(_BUFFERS * size)
        self._buffers = [_Buffer(address + number * size, band, machine, self._loads) for number in range(_BUFFERS)]

    def copy(self, src_ids: Addresses, dst_ids: Addresses) -> None:
        rows = np.arange(len(src_ids), dtype=np.int64) % self._per_buffer
        local = (rows, dst_ids) if self._loads else (src_ids, rows)
        crossing = (src_ids, rows) if self._loads else (rows, dst_ids)
        # One upload for all rounds; the kernels' stream reads it after it is there.
        on_device = self._machine.upload(local[0], local[1], self._machine.kernels)
        for number, start in enumerate(range(0, len(rows), self._per_buffer)):
            some = slice(start, start + self._per_buffer)
            buffer = self._buffers[number % _BUFFERS]
            buffer.copy(self._machine, (crossing[0][some], crossing[1][some]), on_device[:, some])


class _Buffer:
    """One staging buffer: the rows of a few blocks, and the event after which it may be filled again."""

    def __init__(self, address: int, band: Band, machine: Machine, loads: bool) -> None:
        pieces = tuple(address + part * band.part_bytes for part in range(band.parts))
        inside = Side(pieces, band.block_bytes)
        whole = Side((address,), band.block_bytes)
        self._loads = loads
        if loads:
            self._crossing = Band(band.block_bytes, Side((band.src.first,), band.src.stride), whole)
            self._local = Band(band.part_bytes, inside, band.dst)
        else:
            self._local = Band(band.part_bytes, band.src, inside)
            self._crossing = Band(band.block_bytes, whole, Side((band.dst.first,), band.dst.stride))
        self._tables = machine.tables(self._local)
        self._free: Any = None

    def copy(self, machine: Machine, crossing: tuple[Addresses, Addresses], local_ids: Any) -> None:
        table = dma.fragments(self._crossing, *crossing)
        work = KernelCopy(Kernel.DIRECT, self._local, self._tables, local_ids, 0)
        first, second = (machine.dma, machine.kernels) if self._loads else (machine.kernels, machine.dma)
        if self._free is not None:
            first.wait_event(self._free)
        if self._loads:
            machine.copy_fragments(table, first)
        else:
            machine.launch(work, first)
        second.wait_event(first.record_event())
        if self._loads:
            machine.launch(work, second)
        else:
            machine.copy_fragments(table, second)
        self._free = second.record_event()
