"""Block ids, checked before anything is launched: a kernel or a copy engine would follow a wrong one anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamo_kernels.errors import CopyError

Ids = NDArray[np.int64]


def checked_ids(
    num_sources: int, src_ids: Sequence[int] | NDArray[Any], num_targets: int, dst_ids: Sequence[int] | NDArray[Any]
) -> tuple[Ids, Ids]:
    """Both lists as arrays. Raises `CopyError` when an id is out of range or a destination is named twice."""
    sources, targets = _as_array("source", src_ids), _as_array("destination", dst_ids)
    if len(sources) != len(targets):
        raise CopyError(f"{len(sources)} source blocks for {len(targets)} destinations")
    for name, ids, count in (("source", sources, num_sources), ("destination", targets, num_targets)):
        outside = (ids < 0) | (ids >= count)
        if outside.any():
            raise CopyError(f"{name} block {ids[outside][0]} is outside 0..{count - 1}")
    ordered = np.sort(targets)
    if (ordered[1:] == ordered[:-1]).any():
        raise CopyError("a destination block is named twice")
    return sources, targets


def _as_array(name: str, ids: Sequence[int] | NDArray[Any]) -> Ids:
    array = np.asarray(ids)
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise CopyError(f"{name} blocks must be a list of whole numbers, not {array.dtype} of shape {array.shape}")
    if array.dtype.kind == "u" and array.dtype.itemsize == 8 and array.max() > np.iinfo(np.int64).max:
        raise CopyError(f"{name} block {array.max()} is no block number")
    return array.astype(np.int64, copy=False)
