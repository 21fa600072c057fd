"""Loads that arrive a group of layers at a time: what reads a layer waits for its group, not for those behind it.

Groups are of a block's parts, in the order in which they lie. Which layer reads which part is the caller's business;
so is that nothing reads or writes a part before it has waited for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch

from dynamo_kernels.block_view import BlockView
from dynamo_kernels.choices import Direction, Path
from dynamo_kernels.copy import PATH_SETTING
from dynamo_kernels.errors import CopyError
from dynamo_kernels.fence import ComputeFence, SideStream
from dynamo_kernels.ids import Ids, checked_ids
from dynamo_kernels.machine import CudaMachine, Machine
from dynamo_kernels.plan import Chooser, CopyPlan
from dynamo_kernels.reference import copy_by_torch

#: 8 waits came within 5% of what overlap can give; 32 were sometimes slower than one (H200, 2026-11-28).
_MOST_GROUPS = 8
#: A copy of less does not fill PCIe.
_GROUP_BYTES = 8 << 20
#: One part alone crosses in short fragments; neighbours cross together (`Path.STAGED`).
_GROUP_PARTS = 2


def groups_for(parts: int, num_bytes: int) -> int:
    """How many groups a load of blocks with that many parts arrives in; 1: all at once."""
    groups = _MOST_GROUPS
    while groups > 1 and (groups * _GROUP_PARTS > parts or groups * _GROUP_BYTES > num_bytes):
        groups //= 2
    return groups


def group_of(part: int, parts: int, groups: int) -> int:
    """The group that brings `part`."""
    return part * groups // parts


class LayeredCopy:
    """Copies blocks of `src` over blocks of `dst`, a group of parts at a time. Without a machine plain torch copies.

    Call the copies of one load in their order, on one stream: all plans share one staging buffer.
    """

    def __init__(
        self, src: BlockView, dst: BlockView, machine: Machine | None = None, chooser: Chooser | None = None
    ) -> None:
        self._blocks = src.num_blocks, dst.num_blocks
        self._parts, self._block_bytes = len(dst.parts), sum(dst.part_bytes)
        pool: list[Any] = []
        self._copies: dict[int, list[Callable[[Ids, Ids], None]]] = {}
        groups = groups_for(self._parts, self._block_bytes * src.num_blocks)
        while groups > 1:
            copies = self._copies[groups] = []
            for group in range(groups):
                mine = [part for part in range(self._parts) if group_of(part, self._parts, groups) == group]
                some = slice(mine[0], mine[-1] + 1)
                pair = BlockView(src.parts[some]), BlockView(dst.parts[some])
                if machine is None or chooser is None:
                    copies.append(partial(_by_torch, *pair))
                else:
                    shares = cast(Machine, _SharesStaging(machine, pool))
                    copies.append(CopyPlan(*pair, Direction.H2D, shares, chooser).enqueue_checked)
            groups //= 2

    def copies(self, src_ids: Sequence[int], dst_ids: Sequence[int]) -> list[Callable[[], None]]:
        """One call a group, none where the load is to arrive at once. Raises `CopyError` as `copy_blocks` does."""
        sources, targets = checked_ids(self._blocks[0], src_ids, self._blocks[1], dst_ids)
        groups = groups_for(self._parts, len(sources) * self._block_bytes)
        return [partial(copy, sources, targets) for copy in self._copies.get(groups, ())]

    def warm_up(self) -> None:
        """Takes the buffers and compiles the kernels now. Copies block 0 over block 0."""
        for copies in self._copies.values():
            for copy in copies:
                copy(*checked_ids(1, [0], 1, [0]))


def prepare_layers(src: BlockView, dst: BlockView) -> LayeredCopy:
    """For start-up, before block 0 of either view means anything: it is copied once.

    Raises `CopyError` for rows that are not pinned, and whatever the GPU raises where it has no room for the buffers.
    """
    if dst.device.type != "cuda":
        return LayeredCopy(src, dst)
    if not (src.parts[0].is_pinned() and src.parts[-1].is_pinned()):
        raise CopyError("loads arrive layer by layer from pinned memory only")
    from dynamo_kernels.calibration import chooser_for

    # Staged: by fragments the host would be busy with the load for as long as the load itself takes.
    chooser = chooser_for(dst.device, os.environ.get(PATH_SETTING) or Path.STAGED.value)
    made = LayeredCopy(src, dst, CudaMachine(dst.device), chooser)
    made.warm_up()
    torch.cuda.synchronize(dst.device)
    return made


def _by_torch(src: BlockView, dst: BlockView, src_ids: Ids, dst_ids: Ids) -> None:
    copy_by_torch(src, src_ids, dst, dst_ids)


class _SharesStaging:
    """The machine as one of several plans sees it whose copies follow each other: the n-th buffers of all are the same.

    Within a copy they differ, because bands of one plan do not wait for each other.
    """

    def __init__(self, machine: Machine, pool: list[Any]) -> None:
        self._machine, self._pool, self._taken = machine, pool, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._machine, name)

    def staging(self, size: int) -> tuple[int, Any]:
        number, self._taken = self._taken, self._taken + 1
        if number == len(self._pool):
            self._pool.append((0, None, None))
        if self._pool[number][0] < size:
            self._pool[number] = size, *self._machine.staging(size)
        return cast(tuple[int, Any], self._pool[number][1:])


class LayerStream:
    """Such loads beside the engine's own stream. All calls come from the engine's thread."""

    def __init__(self, device: torch.device, parts: int, stream: Any = None) -> None:
        self._device, self._parts = device, parts
        self._side = SideStream(device, stream)
        #: Of each load that nothing has joined yet, the ends of its groups.
        self._ends: list[list[ComputeFence]] = []

    def start(self, fence: ComputeFence, copies: Sequence[Callable[[], None]]) -> ComputeFence:
        """Enqueues all `copies` after the work before `fence`; returns their end. All of them, or an error."""
        ends: list[ComputeFence] = []
        try:
            with self._side.after(fence):
                for copy in copies:
                    copy()
                    ends.append(self._side.fence())
        except BaseException:
            # No stream waits for what was enqueued before the failure, and the caller takes its blocks back.
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            raise
        self._ends.append(ends)
        return ends[-1]

    @property
    def is_open(self) -> bool:
        """Whether a load is under way that was not joined."""
        return bool(self._ends)

    def wait(self, part: int, compute: Any = None) -> None:
        """What `compute` (the current stream when left out) is given from now on sees `part` of all loads."""
        for ends in self._ends:
            self._hold(ends[group_of(part, self._parts, len(ends))], compute)

    def join(self, compute: Any = None) -> None:
        """As `wait`, for all parts."""
        for ends in self._ends:
            self._hold(ends[-1], compute)
        self._ends.clear()

    def fence(self) -> ComputeFence:
        """Everything enqueued here so far."""
        return self._side.fence()

    def _hold(self, end: ComputeFence, compute: Any) -> None:
        on_gpu = compute is None and self._device.type == "cuda"
        end.hold(torch.cuda.current_stream(self._device) if on_gpu else compute)
