"""`copy_blocks`: one call for every pair of views, whatever memory they lie in."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from numpy.typing import NDArray

from dynamo_kernels.block_view import BlockView
from dynamo_kernels.choices import Direction
from dynamo_kernels.errors import CopyError
from dynamo_kernels.ids import checked_ids
from dynamo_kernels.inside import InsidePlan, lies_inside
from dynamo_kernels.plan import CopyPlan, Decision
from dynamo_kernels.reference import copy_by_torch

Plan: TypeAlias = CopyPlan | InsidePlan
#: The one setting: auto, or the path to take wherever it is possible.
PATH_SETTING = "DYNAMO_KERNELS_COPY_PATH"


def copy_blocks(
    src: BlockView,
    src_ids: Sequence[int] | NDArray[Any],
    dst: BlockView,
    dst_ids: Sequence[int] | NDArray[Any],
) -> None:
    """Copies block `src_ids[i]` of `src` over block `dst_ids[i]` of `dst`, every part, as opaque bytes.

    The views may live on different devices. When the call returns, the bytes are in place for the host and for the
    current stream. Raises `CopyError` before anything is copied when an id is out of range, a destination is named
    twice, or the parts differ in size.
    """
    start_copy(src, src_ids, dst, dst_ids)
    device = _gpu_of(src, dst)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def start_copy(
    src: BlockView,
    src_ids: Sequence[int] | NDArray[Any],
    dst: BlockView,
    dst_ids: Sequence[int] | NDArray[Any],
) -> None:
    """As `copy_blocks`, and returns while the copy is under way where a GPU makes it.

    It starts after what the current stream was given before, and whatever that stream is given from now on sees the
    bytes. The host has to wait for the stream before it touches either side.
    """
    if src.part_bytes != dst.part_bytes:
        raise CopyError(f"parts differ: source {src.part_bytes} bytes, destination {dst.part_bytes}")
    sources, targets = checked_ids(src.num_blocks, src_ids, dst.num_blocks, dst_ids)
    if not len(sources):
        return
    plan = _PLANS.between(src, dst)
    if plan is None:
        copy_by_torch(src, sources, dst, targets)
        return
    try:
        plan.enqueue(sources, targets)
    except BaseException:
        # No stream waits for what was enqueued before the failure, and the caller takes its blocks back.
        torch.cuda.synchronize(_gpu_of(src, dst))
        raise


def decisions() -> tuple[Decision, ...]:
    """What `copy_blocks` last chose for every pair of views that is still in use."""
    return tuple(decision for plan in _PLANS.all() for decision in plan.decisions)


def prepare(src: BlockView, dst: BlockView) -> CopyPlan:
    """A plan of one's own between HBM and pinned rows. Raises `CopyError` where only the reference copies."""
    from dynamo_kernels.calibration import chooser_for
    from dynamo_kernels.machine import CudaMachine

    if not _is_hbm_and_pinned(src, dst):
        raise CopyError("a plan copies between one GPU and pinned host memory; `copy_blocks` takes any two views")
    device = _gpu_of(src, dst)
    direction = Direction.D2H if src.device.type == "cuda" else Direction.H2D
    return CopyPlan(src, dst, direction, CudaMachine(device), chooser_for(device, os.environ.get(PATH_SETTING, "")))


def _plan_of(src: BlockView, dst: BlockView) -> Plan | None:
    """None where the reference must copy."""
    if _is_hbm_and_pinned(src, dst):
        return prepare(src, dst)
    if lies_inside(src, dst):
        from dynamo_kernels.machine import CudaMachine

        return InsidePlan(src, dst, CudaMachine(src.device))
    return None


def _gpu_of(src: BlockView, dst: BlockView) -> torch.device:
    return src.device if src.device.type == "cuda" else dst.device


def _is_hbm_and_pinned(src: BlockView, dst: BlockView) -> bool:
    kinds = {src.device.type, dst.device.type}
    if kinds != {"cpu", "cuda"}:
        return False
    host = src if src.device.type == "cpu" else dst
    # One question a view: its parts are columns of one slab. Pageable memory would make every path synchronous.
    return bool(host.parts[0].is_pinned()) and bool(host.parts[-1].is_pinned())


class _Plans:
    """A plan a pair of views, for as long as both live: plans hold addresses only."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: weakref.WeakKeyDictionary[BlockView, weakref.WeakKeyDictionary[BlockView, Plan | None]]
        self._of = weakref.WeakKeyDictionary()

    def between(self, src: BlockView, dst: BlockView) -> Plan | None:
        with self._lock:
            of_src = self._of.setdefault(src, weakref.WeakKeyDictionary())
            if dst not in of_src:
                of_src[dst] = _plan_of(src, dst)
            return of_src[dst]

    def all(self) -> list[Plan]:
        with self._lock:
            return [plan for of_src in self._of.values() for plan in of_src.values() if plan is not None]


_PLANS = _Plans()
